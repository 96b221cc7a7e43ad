"""Copies of an object: copied, pickled, and saved by torch."""

import copy
import io
import pickle

import torch


def twins(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return [copy.deepcopy(thing), pickle.loads(pickle.dumps(thing)), torch.load(file, weights_only=False)]
