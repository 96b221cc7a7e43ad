"""The noise schedule: how much of the signal is left at each training timestep, in float64.

Everything follows from one array, ``alphas_cumprod`` (the alpha_bar_t of the papers): q(x_t | x_0)
= N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I). The presets are one classmethod each, and one entry
of ``SCHEDULES``.

Sources: DDPM (Ho et al. 2020, arXiv 2006.11239), DDIM (Song et al. 2020, arXiv 2010.02502),
improved DDPM (Nichol and Dhariwal 2021, arXiv 2102.09672), zero terminal SNR (Lin et al. 2023,
arXiv 2305.08891), v-prediction (Salimans and Ho 2022, arXiv 2202.00512).
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.checks import check_choice, check_integer, check_number
from .path import NoisePath
from .timestep_lists import explicit_model_timesteps

__all__ = ["SCHEDULES", "NoiseSchedule", "make_schedule"]


def squared_cosine(time: Any, s: float) -> Any:
    """Return alpha_bar of improved DDPM (Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17), but
    for a factor.

    Args:
        time: from 0 (clean data) to 1: a number, or an array of them.
        s: an offset, which keeps the first steps from being too small.
    """
    return np.cos((time + s) / (1 + s) * (math.pi / 2)) ** 2


@dataclass(frozen=True, eq=False)
class NoiseSchedule(NoisePath):
    """A discrete diffusion's alpha_bar_t for t = 0 ... T-1, and what follows from it without a
    model.

    Two schedules are equal, and hash alike, where their ``alphas_cumprod`` agree bit for bit; the
    name does not count.

    Args:
        alphas_cumprod: alpha_bar_t, shape (T,), T >= 1: strictly decreasing within (0, 1]; the last
            may be 0 (zero terminal SNR). Kept as a read-only float64 copy.
        name: what to call the schedule in messages and records.

    Raises:
        TypeError: ``alphas_cumprod`` does not hold real numbers, or ``name`` is no string.
        ValueError: ``alphas_cumprod`` is not 1-D, is empty, holds NaN or infinity, leaves [0, 1] or
            fails to decrease.
    """

    alphas_cumprod: np.ndarray
    name: str = "custom"

    default_spacing = "leading"
    spacings = ("leading", "trailing", "linspace", "uniform", "quad", "log_snr", "karras", "cosine", "beta")
    time_dtype = torch.int64
    after_last = -1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {self.name!r}: pass for example name='custom'")
        alphas_cumprod = _real_vector("alphas_cumprod", self.alphas_cumprod)
        _check_alphas_cumprod(alphas_cumprod)
        alphas_cumprod.setflags(write=False)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseSchedule):
            return NotImplemented
        return self.alphas_cumprod.tobytes() == other.alphas_cumprod.tobytes()

    def __hash__(self) -> int:
        return hash(self.alphas_cumprod.tobytes())

    def serves_models_of(self, other: NoisePath) -> bool:
        if not isinstance(other, NoiseSchedule) or other.num_train_timesteps != self.num_train_timesteps:
            return False
        # Other libraries multiply in float32: the last of 1,000 alpha_bar is off by some 1e-5 of itself.
        return np.allclose(self.alphas_cumprod, other.alphas_cumprod, rtol=1e-3, atol=0)

    def __repr__(self) -> str:
        first, last = self.alphas_cumprod[[0, -1]].tolist()
        return (
            f"NoiseSchedule(name={self.name!r}, num_train_timesteps={self.num_train_timesteps}, "
            f"alphas_cumprod={first:.6g} ... {last:.6g})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles go through __init__: NumPy would hand their array back writable.
        return type(self), (self.alphas_cumprod, self.name)

    # --- Presets ----------------------------------------------------------------------------------------------------

    @classmethod
    def linear(cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """beta rises linearly (DDPM, section 4).

        Args:
            num_train_timesteps: T >= 1.
            beta_start, beta_end: the first and the last beta, in [0, 1].

        Raises:
            TypeError, ValueError: a count that is no integer >= 1, a beta outside [0, 1], or an
                alpha_bar that fails to decrease.
        """
        num_train_timesteps = _check_count(num_train_timesteps)
        _check_unit_interval(beta_start=beta_start, beta_end=beta_end)
        return cls.from_betas(np.linspace(beta_start, beta_end, num_train_timesteps), "linear")

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """sqrt(beta) rises linearly (latent diffusion, Rombach et al. 2022; Stable Diffusion's
        defaults).

        Args and errors as for ``linear``.
        """
        return cls._square_of_linear("scaled_linear", num_train_timesteps, beta_start, beta_end)

    @classmethod
    def quad(cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """sqrt(beta) rises linearly: the original DDIM repository's name and defaults for
        ``scaled_linear``.

        Args and errors as for ``linear``.
        """
        return cls._square_of_linear("quad", num_train_timesteps, beta_start, beta_end)

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """alpha_bar follows a squared cosine, each beta capped (improved DDPM, eq. 17; diffusers
        calls it squaredcos_cap_v2).

        Args:
            num_train_timesteps: T >= 1.
            s: the offset that keeps beta from vanishing near t = 0; finite, >= 0.
            max_beta: no beta exceeds it; in (0, 1].

        Raises:
            TypeError, ValueError: an argument outside those ranges.
        """
        num_train_timesteps = _check_count(num_train_timesteps)
        check_number("s", s, at_least=0, remedy="the paper's value is 0.008")
        _check_unit_interval(max_beta=max_beta)
        time = np.arange(num_train_timesteps + 1) / num_train_timesteps
        signal = squared_cosine(time, s)
        return cls.from_betas(np.minimum(1 - signal[1:] / signal[:-1], max_beta), "cosine")

    @classmethod
    def sigmoid(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """beta rises along a logistic curve over [-6, 6] (the original DDIM repository).

        ``beta_start`` and ``beta_end`` are its asymptotes, so the first beta is a little above
        ``beta_start``. Args and errors as for ``linear``.
        """
        num_train_timesteps = _check_count(num_train_timesteps)
        _check_unit_interval(beta_start=beta_start, beta_end=beta_end)
        logistic = 1 / (1 + np.exp(-np.linspace(-6, 6, num_train_timesteps)))
        return cls.from_betas(beta_start + logistic * (beta_end - beta_start), "sigmoid")

    @classmethod
    def const(cls, num_train_timesteps: int = 1000, beta: float = 0.02) -> NoiseSchedule:
        """The same beta at every step (the original DDIM repository; it takes its ``beta_end``).

        Args:
            num_train_timesteps: T >= 1.
            beta: in (0, 1]; 0 and 1 leave a schedule only where T = 1.

        Raises:
            TypeError, ValueError: as for ``linear``.
        """
        num_train_timesteps = _check_count(num_train_timesteps)
        _check_unit_interval(beta=beta)
        return cls.from_betas(np.full(num_train_timesteps, beta, dtype=np.float64), "const")

    @classmethod
    def jsd(cls, num_train_timesteps: int = 1000) -> NoiseSchedule:
        """beta = 1/T, 1/(T-1), ..., 1 (Sohl-Dickstein et al. 2015, arXiv 1503.03585): alpha_bar
        falls linearly to exactly 0.

        Args:
            num_train_timesteps: T >= 1.

        Raises:
            TypeError, ValueError: a count that is no integer >= 1.
        """
        num_train_timesteps = _check_count(num_train_timesteps)
        return cls.from_betas(1 / np.arange(num_train_timesteps, 0, -1), "jsd")

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray | Tensor, name: str = "custom") -> NoiseSchedule:
        """alpha_bar_t = prod_{s <= t} (1 - beta_s), multiplied in float64 (DDPM, eq. 4).

        Args:
            betas: shape (T,), in [0, 1]. Only the first may be 0 and only the last may be 1, or
                alpha_bar would not decrease.
            name: what to call the schedule.

        Raises:
            TypeError: ``betas`` does not hold real numbers.
            ValueError: ``betas`` is not 1-D, is empty, holds NaN or infinity, leaves [0, 1], or
                alpha_bar fails to decrease.
        """
        betas = _real_vector("betas", betas)
        outside = np.flatnonzero((betas < 0) | (betas > 1))
        if outside.size:
            raise ValueError(
                f"betas must lie in [0, 1], got betas[{outside[0]}] = {betas[outside[0]]}: "
                "if the array holds alphas_cumprod, use NoiseSchedule.from_alphas_cumprod"
            )
        return cls(np.cumprod(1 - betas), name)

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: Sequence[float] | np.ndarray | Tensor, name: str = "custom"
    ) -> NoiseSchedule:
        """A schedule from its alpha_bar_t, shape (T,): the constructor, for any type of array.
        Errors as for the class."""
        return cls(alphas_cumprod, name)  # type: ignore[arg-type]  # the constructor converts

    @classmethod
    def _square_of_linear(
        cls, name: str, num_train_timesteps: int, beta_start: float, beta_end: float
    ) -> NoiseSchedule:
        num_train_timesteps = _check_count(num_train_timesteps)
        _check_unit_interval(beta_start=beta_start, beta_end=beta_end)
        return cls.from_betas(np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2, name)

    # --- What follows from alphas_cumprod ---------------------------------------------------------------------------

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @property
    def digest(self) -> str:
        """SHA-256 of ``alphas_cumprod``, in hexadecimal: what tells one schedule from another in
        files."""
        return hashlib.sha256(np.ascontiguousarray(self.alphas_cumprod).tobytes()).hexdigest()

    @property
    def betas(self) -> np.ndarray:
        """beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} with alpha_bar_{-1} = 1; float64, shape (T,).
        Derived: within some 1e-16 of those given."""
        previous = self._previous_alphas_cumprod
        return (previous - self.alphas_cumprod) / previous

    @property
    def log_snr(self) -> np.ndarray:
        """log(alpha_bar_t / (1 - alpha_bar_t)), float64, shape (T,): decreasing; +inf where
        alpha_bar is 1, -inf where it is 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)

    @property
    def _previous_alphas_cumprod(self) -> np.ndarray:
        return np.concatenate([[1.0], self.alphas_cumprod[:-1]])

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """The schedule with sqrt(alpha_bar) shifted and scaled so that the last alpha_bar is
        exactly 0 and the first is exactly as before.

        Lin et al. 2023, arXiv 2305.08891, Algorithm 1. A schedule that already ends at 0 is
        returned as it is.

        Raises:
            ValueError: T = 1, where the first alpha_bar is the last and cannot both stay and
                vanish.
        """
        if self.alphas_cumprod[-1] == 0:
            return self
        if self.num_train_timesteps == 1:
            raise ValueError(
                "rescale_zero_terminal_snr needs at least 2 training timesteps, got a schedule of 1: "
                "for a single step of zero SNR use NoiseSchedule.from_alphas_cumprod([0.0])"
            )
        signal = np.sqrt(self.alphas_cumprod)
        alphas_cumprod = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2
        alphas_cumprod[0] = self.alphas_cumprod[0]  # the square of the root rounds; the algorithm keeps it
        return NoiseSchedule(alphas_cumprod, f"{self.name}_zero_terminal_snr")

    def alpha_bar(self, t: int, final_alpha_bar: float = 1.0) -> float:
        """alpha_bar_t as a float; t = -1, before the first step, gives ``final_alpha_bar``.

        Args:
            t: -1 <= t < T.
            final_alpha_bar: in (0, 1]: 1.0, or ``alphas_cumprod[0]`` for diffusers'
                ``set_alpha_to_one=False``.

        Raises:
            TypeError: ``t`` is no integer or ``final_alpha_bar`` no real number.
            IndexError: ``t`` is outside [-1, T).
            ValueError: ``final_alpha_bar`` is outside (0, 1].
        """
        t = check_integer("t", t)
        _check_unit_interval(final_alpha_bar=final_alpha_bar)
        if final_alpha_bar == 0:
            raise ValueError(f"final_alpha_bar must be greater than 0, got {final_alpha_bar!r}: the paper uses 1.0")
        if not -1 <= t < self.num_train_timesteps:
            raise IndexError(
                f"t must lie in [-1, {self.num_train_timesteps - 1}] for a schedule of {self.num_train_timesteps} "
                f"timesteps (-1 is before the first step), got {t}: count timesteps from 0"
            )
        return float(final_alpha_bar) if t == -1 else float(self.alphas_cumprod[t])

    def level(self, t: float) -> float:
        """Return alpha_bar_t, for a whole number ``t``: a level of the variance-preserving path.

        Errors as for ``alpha_bar``.
        """
        return self.alpha_bar(t)  # type: ignore[arg-type]  # it says what is wrong with a fraction

    def check_model_timesteps(self, model_timesteps: tuple[float, ...], num_inference_steps: int) -> None:
        """Raise TypeError or ValueError unless these are training timesteps, one for each step."""
        explicit_model_timesteps(model_timesteps, num_inference_steps, self.num_train_timesteps)  # type: ignore[arg-type]

    # --- The forward process ----------------------------------------------------------------------------------------

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise: a sample of q(x_t | x_0) where
        noise is standard normal (DDIM, eq. 4).

        Coefficients are computed in float64. The sum is taken in float64 where an input is float64,
        otherwise in float32, and cast to x0's dtype. Values of a ``t`` on a GPU are read back and
        checked, which waits for it.

        Args:
            x0: shape (B, ...), floating point.
            noise: shape and device of x0, floating point.
            t: one timestep for all samples (int or 0-d integer tensor), or an integer tensor of
                shape (B,); 0 <= t < T.

        Returns:
            x_t, with the shape, dtype and device of x0.

        Raises:
            TypeError: an input is no floating-point tensor, or ``t`` is no integer.
            ValueError: shapes or devices disagree.
            IndexError: a timestep is outside [0, T).
        """
        indices = self._timestep_indices(t, x0, noise, "noise")
        alpha_bar = self.alphas_cumprod[indices]
        return _linear_combination(np.sqrt(alpha_bar), x0, np.sqrt(1 - alpha_bar), noise)

    def velocity(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0, the target of v-prediction
        (Salimans and Ho 2022, section 4).

        Args, precision and errors as for ``add_noise``.

        Returns:
            v, with the shape, dtype and device of x0.
        """
        indices = self._timestep_indices(t, x0, noise, "noise")
        alpha_bar = self.alphas_cumprod[indices]
        return _linear_combination(-np.sqrt(1 - alpha_bar), x0, np.sqrt(alpha_bar), noise)

    def posterior_mean_variance(self, x0: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, float | Tensor]:
        """Mean and variance of q(x_{t-1} | x_t, x_0) for adjacent timesteps, with alpha_bar_{-1} =
        1 (DDPM, eq. 6-7).

        mean = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0 + sqrt(alpha_t) (1 -
        alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t; variance = (1 - alpha_bar_{t-1}) / (1 -
        alpha_bar_t) beta_t. At t = 0 they are exactly x_0 and 0.

        Args:
            x0, x_t: shape (B, ...), floating point, on one device.
            t: as for ``add_noise``.

        Returns:
            The mean, with the shape, dtype and device of x0; and the variance, a float where ``t``
            is one timestep, otherwise a tensor of shape (B, 1, ..., 1) in the dtype of the
            computation (float64 or float32).

        Raises:
            TypeError, ValueError, IndexError: as for ``add_noise``.
        """
        indices = self._timestep_indices(t, x0, x_t, "x_t")
        beta, previous = self.betas[indices], self._previous_alphas_cumprod[indices]
        alpha = self.alphas_cumprod[indices] / previous  # 1 - beta would lose digits where beta is near 1
        # Where the schedule starts at alpha_bar = 1, the formula is 0 / 0 at t = 0; its value there
        # is known without division.
        remaining = np.where(indices == 0, 1.0, 1 - self.alphas_cumprod[indices])
        x0_coefficient = np.where(indices == 0, 1.0, np.sqrt(previous) * beta / remaining)
        x_t_coefficient = np.sqrt(alpha) * (1 - previous) / remaining
        variance = (1 - previous) / remaining * beta
        mean = _linear_combination(x0_coefficient, x0, x_t_coefficient, x_t)
        if indices.ndim == 0:
            return mean, float(variance)
        return mean, _broadcastable(variance, x0, _computation_dtype(x0, x_t))

    def _timestep_indices(self, t: int | Tensor, first: Tensor, second: Tensor, second_name: str) -> np.ndarray:
        """``t`` as checked int64 indices, shape () or (B,), for a computation on these two tensors."""
        _check_pair(first, second, second_name)
        if isinstance(t, Tensor):
            _check_timestep_tensor(t, first)
            indices = t.detach().cpu().numpy().astype(np.int64)
        else:
            # A Python integer may be too large for int64, so it is compared as it is.
            indices = np.asarray(check_integer("t", t, remedy="or pass an integer tensor (B,)"), dtype=object)
        outside = indices[(indices < 0) | (indices >= self.num_train_timesteps)]
        if outside.size:
            raise IndexError(
                f"t must lie in [0, {self.num_train_timesteps - 1}] for a schedule of {self.num_train_timesteps} "
                f"timesteps, got {outside.flat[0]}: count timesteps from 0"
            )
        return indices.astype(np.int64)


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "scaled_linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
    "squaredcos_cap_v2": NoiseSchedule.cosine,  # diffusers' name
    "sigmoid": NoiseSchedule.sigmoid,
    "quad": NoiseSchedule.quad,
    "const": NoiseSchedule.const,
    "jsd": NoiseSchedule.jsd,
}
"""Presets by name; each takes ``num_train_timesteps`` and the keyword arguments of its classmethod."""


def make_schedule(name: str, num_train_timesteps: int = 1000, **kwargs: float) -> NoiseSchedule:
    """The preset of this name.

    Args:
        name: a key of ``SCHEDULES``.
        num_train_timesteps: T >= 1.
        **kwargs: the preset's own arguments, for example ``beta_start``.

    Raises:
        ValueError: the name is unknown, or an argument is out of range.
        TypeError: the preset has no such argument, or an argument is of the wrong type.
    """
    check_choice("name", name, SCHEDULES, "for another schedule use NoiseSchedule.from_betas or from_alphas_cumprod")
    known = [
        parameter for parameter in inspect.signature(SCHEDULES[name]).parameters if parameter != "num_train_timesteps"
    ]
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise TypeError(
            f"schedule {name!r} takes {', '.join(known) or 'no further arguments'}, got {unknown[0]!r}: "
            "leave it out or choose another schedule"
        )
    return SCHEDULES[name](num_train_timesteps, **kwargs)


# --- Arithmetic on tensors ------------------------------------------------------------------------------------------


def _computation_dtype(first: Tensor, second: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)


def _broadcastable(values: np.ndarray, like: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values of shape () or (B,) as a tensor that multiplies ``like`` sample by sample."""
    shape = values.shape + (1,) * (like.ndim - 1) if values.ndim else ()
    return torch.from_numpy(np.asarray(values)).reshape(shape).to(device=like.device, dtype=dtype)


def _linear_combination(
    first_coefficient: np.ndarray, first: Tensor, second_coefficient: np.ndarray, second: Tensor
) -> Tensor:
    dtype = _computation_dtype(first, second)
    total = _broadcastable(first_coefficient, first, dtype) * first.to(dtype)
    total = total + _broadcastable(second_coefficient, second, dtype) * second.to(dtype)
    return total.to(first.dtype)


# --- Checks ---------------------------------------------------------------------------------------------------------


def _check_count(num_train_timesteps: int) -> int:
    return check_integer("num_train_timesteps", num_train_timesteps, at_least=1, remedy="1000 is usual")


def _check_unit_interval(**values: Any) -> None:
    for name, value in values.items():
        check_number(name, value, at_least=0, at_most=1)


def _real_vector(name: str, values: Any) -> np.ndarray:
    """A float64 copy of shape (T,), finite, T >= 1."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()
    try:
        array = np.asarray(values)
    except ValueError:  # rows of unequal length
        array = np.asarray(None)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got {values!r}: pass a 1-D array or list of floats")
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-D with shape (T,), got shape {array.shape}: flatten or index it first")
    if array.size == 0:
        raise ValueError(f"{name} must hold at least one timestep, got shape {array.shape}: pass T >= 1 values")
    array = array.astype(np.float64) + 0.0  # a copy; and -0.0 becomes 0.0, which compares by bytes
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(f"{name} must be finite, got {name}[{bad[0]}] = {array[bad[0]]}: remove NaN and infinity")
    return array


def _check_alphas_cumprod(alphas_cumprod: np.ndarray) -> None:
    outside = np.flatnonzero((alphas_cumprod < 0) | (alphas_cumprod > 1))
    if outside.size:
        raise ValueError(
            f"alphas_cumprod must lie in [0, 1], got alphas_cumprod[{outside[0]}] = {alphas_cumprod[outside[0]]}: "
            "pass the cumulative product of 1 - beta"
        )
    rises = np.flatnonzero(np.diff(alphas_cumprod) >= 0)
    if rises.size:
        t = rises[0]
        raise ValueError(
            f"alphas_cumprod must be strictly decreasing, got {alphas_cumprod[t]} at t = {t} and "
            f"{alphas_cumprod[t + 1]} at t = {t + 1}: every beta after the first must be greater than 0 and every one "
            "before the last less than 1, and the product must stay within float64 (if the array holds betas, use "
            "NoiseSchedule.from_betas)"
        )


def _check_pair(first: Tensor, second: Tensor, second_name: str) -> None:
    for name, tensor in (("x0", first), (second_name, second)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}: wrap it in torch.as_tensor")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}: convert it with .float()")
    if first.shape != second.shape:
        raise ValueError(
            f"{second_name} must have the shape of x0, {tuple(first.shape)}, got {tuple(second.shape)}: expand it first"
        )
    if first.device != second.device:
        raise ValueError(f"{second_name} must be on x0's device, {first.device}, got {second.device}: move it first")


def _check_timestep_tensor(t: Tensor, batch: Tensor) -> None:
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"t must be an integer tensor, got dtype {t.dtype}: convert it with .long()")
    if t.ndim and (batch.ndim == 0 or t.shape != batch.shape[:1]):
        raise ValueError(
            f"t must be 0-d or have shape (batch,) = {tuple(batch.shape[:1])}, got shape {tuple(t.shape)}: "
            "pass one timestep per sample, or an int for all"
        )
