"""Choices of options in which all pairs of values meet, in place of all combinations."""

import itertools
import random


def covering(options: dict[str, list], seed: int, strength: int = 2) -> list[dict]:
    """Return choices that cover every pair (triple, ...) of values of different options, found greedily."""
    rng = random.Random(seed)
    names = list(options)

    def met(choice: dict) -> set:
        return {
            tuple((n, options[n].index(choice[n])) for n in group) for group in itertools.combinations(names, strength)
        }

    wanted = {
        tuple(zip(group, values, strict=True))
        for group in itertools.combinations(names, strength)
        for values in itertools.product(*(range(len(options[n])) for n in group))
    }
    chosen = []
    while wanted:
        start = dict(rng.choice(sorted(wanted)))
        tries = [{n: options[n][start.get(n, rng.randrange(len(options[n])))] for n in names} for _ in range(30)]
        best = max(tries, key=lambda choice: len(met(choice) & wanted))
        wanted -= met(best)
        chosen.append(best)
    return chosen
