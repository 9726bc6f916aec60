"""Who takes part in the contest: entrants, sets, and the runs that each has."""

from __future__ import annotations

from rivals import ENTRANTS

# Entrants of ours and what they add to `headstart train TABLE`.
BUDGET = ("--time-budget", "5m")
OURS: dict[str, tuple[str, ...]] = {
    "headstart": (),
    "headstart-without-blend": ("--heads", "logistic"),
    "headstart-without-geometry": ("--fit", "crop", "--size", "224"),
    "headstart-without-depths": ("--taps", "final"),
    "headstart-without-views": ("--views", "plain"),
    "headstart-5m": BUDGET,
    "headstart-5m-without-interpolation": (*BUDGET, "--interpolation", "100"),
    "probe-alone": ("--strategy", "probe"),
    "lp-ft": ("--strategy", "lp-ft"),
    "finetune": ("--strategy", "finetune"),
}
OURSELVES = "headstart"
ARMS = tuple(name for name in OURS if not name.startswith(OURSELVES))
# They only tell what a part brings: they take the features that headstart has computed, and their time says nothing.
WITHOUT = tuple(name for name in OURS if name.startswith("headstart-without-"))
# What is told by two entrants, the one with it first.
BROUGHT = {
    "blend": ("headstart", "headstart-without-blend"),
    "geometry": ("headstart", "headstart-without-geometry"),
    "depths": ("headstart", "headstart-without-depths"),
    "views": ("headstart", "headstart-without-views"),
    "training further": ("headstart-5m", "headstart"),
    "interpolation": ("headstart-5m", "headstart-5m-without-interpolation"),
}
RIVALS = tuple(ENTRANTS)
# Of a rival's variants that have run the most accurate one counts; the first has to.
VARIANTS = {"fastai": ("fastai", "fastai-lr-find"), "sklearn": ("sklearn", "sklearn-tuned", "sklearn-unscaled")}
# The rivals, all variants of one under its first name.
CONTENDERS = tuple(name for name in RIVALS if not any(name in others for _, *others in VARIANTS.values()))
DEEP = tuple(name for name in RIVALS if name not in VARIANTS["sklearn"])

SETS = {  # and what has to be known of them; near-duplicates are those that `headstart audit` finds
    "hymenoptera": "ants and bees; a subset of ImageNet",
    "dogscats": "dogs and cats, of which ImageNet has many breeds",
    "imagewoof": "ten breeds of dogs; a subset of ImageNet",
    "scenes": "15 kinds of scenes, grey",
    "flowers": "five flowers, 128 pixels, blurred; at most 100 a class for training, of 3,227 in all",
    "chest_xray": "normal or pneumonia; some patients, and one file, are in both parts",
    "clipart": "seven kinds of things, drawn; 3 test pictures have a near-duplicate in training, one of them the same "
    "file, and one file is in the test under two labels",
    "stamps": "eight kinds of things on white; 1 test picture has a near-duplicate in training",
    "fashion": "ten kinds of clothes, 28 grey pixels a side (Fashion-MNIST); unseen until headstart was done",
}
MADE = ("clipart", "stamps", "fashion")  # by more_sets.py
UNSEEN = ("fashion",)  # before all rules of headstart were made
LARGEST = {"flowers": 100}  # pictures a class that a set's training is cut to
FULL, CUT, SHOTS = "full", "10 a class", 10
SEEDS = {FULL: (0,), CUT: (0, 1, 2)}
EPOCHS = {"hymenoptera": 25}  # of the tutorial's loop; 10 elsewhere


def takes_part(entrant: str, cut: str) -> bool:
    """Whether an entrant runs on sets so cut: of few pictures none are kept by which training further is judged."""
    return cut == FULL or BUDGET[0] not in OURS.get(entrant, ())
