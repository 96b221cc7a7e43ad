"""Scenes: pictures of solids on a floor, 32 x 32 in colour, rendered here, so nobody else's licence
applies.

    python training/scenes.py --out scenes.npz --count 44000
    python training/scenes.py --preview scenes.png

Each picture has one to three solids (six kinds) on a patterned floor, under a directional light
that casts shadows and highlights; colours, sizes, rotations, patterns, light and camera vary, and
solids hide each other. The label is the kind of the solid nearest to the camera. Picture ``i`` is a
function of ``(seed, i)`` alone.
"""

from __future__ import annotations

import argparse
import colorsys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

SIZE = 32
KINDS = ("Sphere", "Cylinder", "Cube", "Octahedron", "Pyramid", "Cone")
_SUPERSAMPLING = 3
_SOLIDS = 3  # at most, in a picture
_FACES = 13  # at most, of a solid
_FAR = 1e9
_BATCH = 8  # pictures at a time, so that what is computed of them stays in the cache


def _faces(kind: str) -> np.ndarray:
    """Return the planes ``(_FACES, 4)`` of a solid of size 1 around the origin: inside,
    normal . p <= offset."""
    axes = np.eye(3)
    if kind == "Cube":
        normals, offsets = np.concatenate([axes, -axes]), [0.8] * 6
    elif kind == "Octahedron":
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
        normals, offsets = signs / np.sqrt(3), [1.2 / np.sqrt(3)] * 8
    elif kind == "Cylinder":
        normals, offsets = np.array([axes[1], -axes[1]]), [1.0, 1.0]
    elif kind in ("Pyramid", "Cone"):  # a cone is a pyramid with many sides
        sides = 4 if kind == "Pyramid" else _FACES - 1
        angles = 2 * np.pi * np.arange(sides) / sides
        radius, height = 1.1 if kind == "Pyramid" else 1.0, 2.2
        walls = np.stack([height * np.cos(angles), np.full(sides, radius), height * np.sin(angles)], 1)
        walls /= np.linalg.norm(walls, axis=1, keepdims=True)
        apex = np.array([0.0, height - 1.0, 0.0])
        normals, offsets = np.concatenate([walls, [-axes[1]]]), [*(walls @ apex), 1.0]
    else:
        normals, offsets = np.zeros((0, 3)), []
    planes = np.zeros((_FACES, 4))
    planes[:, 3] = 1.0  # 0 . p <= 1 holds everywhere
    planes[: len(normals), :3], planes[: len(normals), 3] = normals, offsets
    return planes


_PLANES = torch.tensor(np.stack([_faces(kind) for kind in KINDS]), dtype=torch.float32)
# Diagonals of the quadrics p' Q p <= 1: a ball, a round wall, and none.
_QUADRICS = torch.tensor([[1.0, 1, 1], [1.0, 0, 1]] + [[0.0, 0, 0]] * 4)
_HALF_HEIGHT = torch.tensor([1.0, 1.0, 0.8, 1.2, 1.0, 1.0])  # from the centre down to the floor


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _turned(v: Tensor, angle: Tensor) -> Tensor:
    """Turn vectors ``(..., 3)`` around the vertical axis."""
    c, s = angle.cos(), angle.sin()
    x, y, z = v.unbind(-1)
    return torch.stack([c * x + s * z, y.expand_as(x), c * z - s * x], -1)


class Scenes:
    """A batch of B scenes as tensors, drawn from ``(seed, index)`` each."""

    def __init__(self, seed: int, first: int, count: int):
        rows = [self._draw(np.random.default_rng([seed, index])) for index in range(first, first + count)]
        drawn = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        self.labels = drawn["kinds"][torch.arange(count), drawn["nearest"]]
        self._values = {name: value.float() if value.is_floating_point() else value for name, value in drawn.items()}

    @staticmethod
    def _draw(rng: np.random.Generator) -> dict[str, np.ndarray]:
        number = rng.integers(1, _SOLIDS + 1)
        sizes = rng.uniform(0.55, 1.0, _SOLIDS) * (1.15 if number == 1 else 0.9)
        places: list[np.ndarray] = []
        while len(places) < number:  # solids stand apart
            place = rng.uniform([-1.7, -1.4], [1.7, 1.6]) * (0.5 if number == 1 else 1.0)
            if all(
                np.hypot(*(place - p)) > 0.85 * (sizes[len(places)] + s) for p, s in zip(places, sizes, strict=False)
            ):
                places.append(place)
            elif rng.random() < 0.05:
                places, sizes = [], sizes * 0.9
        places += [np.array([0.0, _FAR])] * (_SOLIDS - number)

        def colour(saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
            return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)))

        azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.5)
        light = np.array([np.cos(azimuth), height, np.sin(azimuth)])
        warmth = rng.uniform(-0.12, 0.12)
        return {
            "kinds": rng.integers(0, len(KINDS), _SOLIDS),
            "nearest": np.array(int(np.argmin([place[1] for place in places]))),
            "places": np.stack(places),
            "sizes": sizes,
            "angles": rng.uniform(0, 2 * np.pi, _SOLIDS),
            "colours": np.stack([colour((0.45, 1.0), (0.55, 1.0)) for _ in range(_SOLIDS)]),
            "bands": np.where(rng.random(_SOLIDS) < 0.35, rng.uniform(4.0, 9.0, _SOLIDS), 0.0),
            "shine": rng.uniform(0.0, 0.7, _SOLIDS),
            "floor": np.stack([colour((0.05, 0.6), (0.35, 0.95)) for _ in range(2)]),
            "pattern": np.array(rng.integers(0, 3)),
            "pattern_scale": np.array(rng.uniform(0.5, 1.3)),
            "pattern_angle": np.array(rng.uniform(0, 2 * np.pi)),
            "sky": np.stack([colour((0.05, 0.6), (0.5, 1.0)) for _ in range(2)]),
            "light": light / np.linalg.norm(light),
            "light_colour": np.array([1 + warmth, 1.0, 1 - warmth]) * rng.uniform(0.75, 1.05),
            "ambient": np.array(rng.uniform(0.2, 0.4)),
            "camera": np.array([rng.uniform(-0.7, 0.7), rng.uniform(1.6, 3.2), -5.2]),
        }

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def render(self) -> Tensor:
        """Return the pictures ``(B, 3, SIZE, SIZE)`` float32 in [0, 1]."""
        n = SIZE * _SUPERSAMPLING
        across = (torch.arange(n) + 0.5) / n * 2 - 1
        y, x = torch.meshgrid(-across, across, indexing="ij")
        target = torch.tensor([0.0, 0.55, 0.0])
        ahead = F.normalize(target - self.camera, dim=-1)
        right = F.normalize(torch.cross(torch.tensor([0.0, 1.0, 0.0]).expand_as(ahead), ahead, dim=-1), dim=-1)
        up = torch.cross(ahead, right, dim=-1)
        x, y = x.reshape(1, -1, 1), y.reshape(1, -1, 1)
        rays = F.normalize(ahead[:, None] + 0.5 * (x * right[:, None] + y * up[:, None]), dim=-1)
        colour = self._colour(self.camera[:, None].expand_as(rays), rays)
        picture = colour.transpose(1, 2).unflatten(2, (n, n)).clamp(0, 1)
        return F.avg_pool2d(picture, _SUPERSAMPLING) ** (1 / 2.2)

    def _hit(self, start: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
        """Return where rays ``(B, N, 3)`` enter each solid, ``(B, K, N)``, or _FAR, and the normals
        ``(B, K, N, 3)``, in the solid's own axes."""
        centre = torch.stack([self.places[..., 0], _HALF_HEIGHT[self.kinds] * self.sizes, self.places[..., 1]], -1)
        angle = -self.angles[:, :, None]
        o = _turned((start[:, None] - centre[:, :, None]) / self.sizes[:, :, None, None], angle)
        d = _turned(rays[:, None] / self.sizes[:, :, None, None], angle)
        planes = _PLANES[self.kinds]  # (B, K, F, 4)
        # All faces at once: (B, K, N, F).
        slope = d @ planes[..., :3].transpose(2, 3)
        room = planes[:, :, None, :, 3] - o @ planes[..., :3].transpose(2, 3)
        at = room / torch.where(slope.abs() < 1e-9, 1e-9, slope)
        enter, face = torch.where(slope < -1e-9, at, -_FAR).max(-1)
        normal = planes[..., :3].gather(2, face[..., None].expand(-1, -1, -1, 3))
        leave = torch.where(slope > 1e-9, at, _FAR).amin(-1)
        leave = torch.where(((slope.abs() <= 1e-9) & (room < 0)).any(-1), -_FAR, leave)
        q = _QUADRICS[self.kinds][:, :, None]
        a, b, c = _dot(q * d, d), _dot(q * o, d), _dot(q * o, o) - 1
        root = b * b - a * c
        has_quadric = q.sum(-1) > 0
        near = (-b - root.clamp(min=0).sqrt()) / a.clamp(min=1e-9)
        far = (-b + root.clamp(min=0).sqrt()) / a.clamp(min=1e-9)
        inwards = has_quadric & (near > enter)
        enter = torch.where(inwards, near, enter)
        normal = torch.where(inwards[..., None], q * (o + near[..., None] * d), normal)
        leave = torch.where(has_quadric & (far < leave), far, leave)
        missed = (has_quadric & (root < 0)) | (enter >= leave) | (enter < 1e-3)
        return torch.where(missed, _FAR, enter), F.normalize(normal, dim=-1)

    def _lit(self, points: Tensor, normals: Tensor) -> Tensor:
        """Return the share of the light ``(B, N)`` that reaches points."""
        light = self.light[:, None].expand_as(points)
        blocked = (self._hit(points + 2e-3 * normals, light)[0] < _FAR).any(1)
        return _dot(normals, light).clamp(min=0) * ~blocked

    def _colour(self, start: Tensor, rays: Tensor) -> Tensor:
        """Return the linear colours ``(B, N, 3)`` that rays see."""
        distances, normals = self._hit(start, rays)
        nearest = distances.argmin(1)  # (B, N)
        distance = distances.gather(1, nearest[:, None])[:, 0]
        own = normals.gather(1, nearest[:, None, :, None].expand(-1, 1, -1, 3))[:, 0]
        angle = self.angles.gather(1, nearest)
        normal = _turned(own, angle)
        down = rays[..., 1].clamp(max=-1e-6)
        floor_distance = torch.where(rays[..., 1] < -1e-6, -start[..., 1] / down, _FAR)
        on_floor = (floor_distance < distance) & (floor_distance < 40)
        distance = torch.where(on_floor, floor_distance, distance)
        seen = distance < 1e6
        points = start + torch.where(seen, distance, 0)[..., None] * rays
        normal = torch.where(on_floor[..., None], torch.tensor([0.0, 1.0, 0.0]), normal)

        solid = self.colours.gather(1, nearest[..., None].expand(-1, -1, 3))
        bands = self.bands.gather(1, nearest)
        striped = (bands > 0) & ((bands * points[..., 1]).sin() > 0.2)
        solid = torch.where(striped[..., None], 1 - 0.75 * solid, solid)
        albedo = torch.where(on_floor[..., None], self._floor(points), solid) ** 2.2

        light = self._lit(points, normal)[..., None] * self.light_colour[:, None]
        colour = albedo * (self.ambient[:, None, None] + 0.85 * light)
        half = F.normalize(self.light[:, None] - rays, dim=-1)
        shine = self.shine.gather(1, nearest) * _dot(half, normal).clamp(min=0) ** 40 * ~on_floor
        colour = colour + shine[..., None] * (light > 0)
        height = (rays[..., 1:2] * 2).clamp(0, 1)
        sky = (self.sky[:, :1] * (1 - height) + self.sky[:, 1:] * height) ** 2.2
        haze = (floor_distance / 40).clamp(0, 1)[..., None] * on_floor[..., None]
        return torch.where(seen[..., None], colour * (1 - haze) + sky * haze, sky)

    def _floor(self, points: Tensor) -> Tensor:
        """Return the floor's colour at points: plain, striped or a checkerboard."""
        turned = _turned(points, self.pattern_angle[:, None]) / self.pattern_scale[:, None, None]
        x, z = turned[..., 0].floor(), turned[..., 2].floor()
        pattern = self.pattern[:, None]
        second = torch.where(pattern == 1, x % 2 == 1, (pattern == 2) & ((x + z) % 2 == 1))
        return torch.where(second[..., None], self.floor[:, 1:], self.floor[:, :1])


def render(count: int, seed: int = 0, first: int = 0, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Return pictures ``(count, 3, 32, 32)`` uint8 and labels ``(count,)`` int64."""
    pictures, labels = [], []
    for begin in tqdm(range(0, count, _BATCH), disable=not progress, unit="batch"):
        scenes = Scenes(seed, first + begin, min(_BATCH, count - begin))
        pictures.append((scenes.render() * 255).round().byte())
        labels.append(scenes.labels)
    return torch.cat(pictures), torch.cat(labels)


def load_split(split: str, path: Path) -> tuple[Tensor, Tensor]:
    """Load pictures ``(N, 3, 32, 32)`` float32 in [-1, 1] and labels ``(N,)`` int64 that ``--out``
    wrote.

    ``split`` is "test", the last tenth of the file, or "train", the others.
    """
    with np.load(path) as file:
        pictures, labels = torch.from_numpy(file["pictures"]), torch.from_numpy(file["labels"])
    part = slice(-(len(labels) // 10), None) if split == "test" else slice(0, len(labels) - len(labels) // 10)
    return pictures[part].float() / 127.5 - 1, labels[part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the pictures and labels here (.npz)")
    parser.add_argument("--preview", type=Path, help="write a grid of 96 pictures here (.png)")
    parser.add_argument("--count", type=int, default=44_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.preview is not None:
        pictures, _ = render(96, args.seed)
        grid = pictures.unflatten(0, (8, 12)).permute(0, 3, 1, 4, 2).reshape(8 * SIZE, 12 * SIZE, 3)
        Image.fromarray(grid.numpy()).resize((12 * SIZE * 3, 8 * SIZE * 3), Image.Resampling.NEAREST).save(args.preview)
    if args.out is not None:
        pictures, labels = render(args.count, args.seed, progress=True)
        np.savez_compressed(args.out, pictures=pictures.numpy(), labels=labels.numpy())


if __name__ == "__main__":
    main()
