"""How the predicted x0 is clipped: what a sampler is asked for, and what a plan then does."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.checks import check_number, refuse


@dataclass(frozen=True)
class Thresholding:
    """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487).

    Attributes:
        ratio: the quantile of abs(x0) that x0 is divided by.
        maximum: the most that this quantile may be.
    """

    ratio: float
    maximum: float


@dataclass(frozen=True)
class Clipping:
    """What a sampler is asked to do with the predicted x0; None leaves it to the model.

    Args:
        clip_sample: clip x0 to [-range, range]. None: if a range is known.
        clip_sample_range: half the width of the range of clean samples. None: the model's, or else
            1.
        use_clipped_model_output: derive eps again from the clipped x0.
        thresholding: scale x0 by its ``dynamic_thresholding_ratio`` quantile, at most
            ``sample_max_value``, before it is clipped.

    Raises:
        TypeError, ValueError: a value is out of range, or two contradict each other.
    """

    clip_sample: bool | None = None
    clip_sample_range: float | None = None
    use_clipped_model_output: bool = False
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def __post_init__(self) -> None:
        if self.clip_sample_range is not None:
            check_number("clip_sample_range", self.clip_sample_range, above=0)
        if self.use_clipped_model_output and self.clip_sample is False:
            refuse("use_clipped_model_output needs clipping", False, "leave clip_sample=False out")
        if not self.thresholding:
            return
        check_number("dynamic_thresholding_ratio", self.dynamic_thresholding_ratio, above=0, at_most=1)
        check_number("sample_max_value", self.sample_max_value, above=0)
        if self.clip_sample is False:
            refuse("thresholding clips x0", False, "leave clip_sample=False out, or thresholding")

    @property
    def asked_for(self) -> bool | None:
        """Whether x0 is to be clipped; None where the model decides."""
        return True if self.thresholding else self.clip_sample

    @property
    def threshold(self) -> Thresholding | None:
        return Thresholding(self.dynamic_thresholding_ratio, self.sample_max_value) if self.thresholding else None

    def half_range(self, model: object = None) -> float | None:
        """Return what x0 is clipped to beside a model, which may state its ``clip_sample_range``;
        None for no clipping."""
        if self.asked_for is False:
            return None
        known = self.clip_sample_range
        if known is None:
            known = getattr(model, "clip_sample_range", None)
        return 1.0 if known is None and self.asked_for else known

    def check_unclipped(self) -> None:
        """Raise ValueError if clipping was asked for: a step that clips has no inverse."""
        asked = {
            "thresholding=True": self.thresholding,
            "use_clipped_model_output=True": self.use_clipped_model_output,
            "clip_sample=True": self.clip_sample,
            f"clip_sample_range={self.clip_sample_range}": self.clip_sample is None
            and self.clip_sample_range is not None,
        }
        if found := next((what for what in asked if asked[what]), None):
            raise ValueError(
                f"a step that clips has no inverse, got a sampler with {found}: make one with clip_sample=False"
            )
