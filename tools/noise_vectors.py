"""Write the published test vectors of the noise standard.

    python tools/noise_vectors.py > tests/data/noise_vectors.json

Each entry has a seed, a step, a stream and a first counter, and the expected values: the words in
hexadecimal, and the normals as the bits of their float32. Other implementations of the standard can
be checked against this file, as our tests do.
"""

import json

from ddim_fast.kernels.noise import NOISE_STANDARD_VERSION, philox_words, sample_seeds, words_to_normals

CASES = [
    (0, 0, 0, 0),
    (1, 0, 0, 0),
    (0, 1, 0, 0),
    (0, 0, 1, 0),
    (2**32, 7, 0, 3),
    (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 2),
    (0x0123456789ABCDEF, 999, 2, 12345),
]


def entry(seed: int, step: int, stream: int, first_counter: int) -> dict:
    words = philox_words(seed, 2, step, stream, first_counter)
    normals = words_to_normals(words)
    return {
        "seed": seed,
        "step": step,
        "stream": stream,
        "first_counter": first_counter,
        "words": [f"{w:08x}" for w in words.ravel()],
        "normals_bits": [f"{b:08x}" for b in normals.view("uint32").ravel()],
        "normals": [float(f"{z:.7g}") for z in normals.ravel()],
    }


if __name__ == "__main__":
    seeds = [{"seed": seed, "sample_seeds": [int(s) for s in sample_seeds(seed, 4)]} for seed in (0, 1, 2**64 - 1)]
    vectors = {"version": NOISE_STANDARD_VERSION, "philox": [entry(*case) for case in CASES], "sample_seeds": seeds}
    print(json.dumps(vectors, indent=1))
