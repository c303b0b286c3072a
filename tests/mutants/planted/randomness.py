"""Mistakes in what is random: seeds, layers, draws, and their repetition."""

from __future__ import annotations

from attnkit import RandomWindow
from tests.mutants.mutant import Mutant

PLACE = "attnkit.primitives.random_window:RandomWindowHeads.__init__"
PERMUTATION = "attnkit.primitives.random_window:RandomWindowHeads.permutation"
SMALL = (RandomWindow(2, 2),)

MUTANTS = [
    Mutant(
        "seed_ignored",
        "Random windows ignore the seed.",
        PERMUTATION,
        "(self.random.seed, *self.place, *grid.sizes, draw)",
        "(*self.place, *grid.sizes, draw)",
        SMALL,
        ("seeds_only",),
    ),
    Mutant(
        "windows_repeat_across_layers",
        "Random windows are the same in every layer.",
        PLACE,
        "(context.layer, context.group)",
        "(0, context.group)",
        SMALL,
        ("seeds_only",),
    ),
    Mutant(
        "windows_repeat_across_groups",
        "Random windows are the same in every group of a mix.",
        "attnkit.heads:HeadMix.__init__",
        "BuildContext(dim, self.head_dim, layer, index)",
        "BuildContext(dim, self.head_dim, layer)",
        SMALL,
        ("seeds_only",),
    ),
    Mutant(
        "window_cache_forgets_the_seed",
        "Windows of another seed are taken from the cache.",
        "attnkit.primitives.random_window:RandomWindowHeads.order",
        '("random windows", self.random.seed, self.place',
        '("random windows", self.place',
        SMALL,
        ("seeds_only",),
    ),
    Mutant(
        "one_draw_for_all_passes",
        "Training sees the same windows in every pass.",
        PERMUTATION,
        'inputs.draw.to(device).div(passes, rounding_mode="floor") + 1',
        "inputs.draw.to(device) * 0 + 1",
        SMALL,
        ("seeds_only",),
    ),
    Mutant(
        "first_draw_for_good",
        "Where nothing is to be resampled, the first training pass draws what all later ones see.",
        PERMUTATION,
        "(self.random.seed, *self.place, *grid.sizes, draw)",
        "(self.random.seed, *self.place, *grid.sizes, draw if inputs.draw is None else inputs.draw + 1)",
        (RandomWindow(2, 2, resample=0),),
        ("seeds_only",),
    ),
    Mutant(
        "global_random_state",
        "Windows are drawn from PyTorch's global random state.",
        "attnkit.primitives.permutation:random_permutation",
        "torch.argsort(_mixed(_mixed(number ^ first) + second))",
        "torch.randperm(tokens, device=device)",
        SMALL,
        ("seeds_only",),
    ),
    Mutant(
        "words_of_31_bits",
        "Only the lower half of a seed counts.",
        "attnkit.primitives.permutation:random_permutation",
        "lower, upper = word & _WORD, (word >> 31) & _WORD",
        "lower, upper = word & _WORD, 0",
        SMALL,
        ("seeds_only",),
    ),
    Mutant(
        "draws_not_saved",
        "The number of draws is not part of the state dict.",
        "attnkit.heads:HeadMix.__init__",
        "torch.zeros((), dtype=torch.int64))",
        "torch.zeros((), dtype=torch.int64), persistent=False)",
        SMALL,
        ("transformed",),
        12,
    ),
    Mutant(
        "draw_counted_twice",
        "A region that checkpointing runs a second time draws anew.",
        "attnkit.primitives.draws:DrawCounter.next",
        "if torch._C._current_graph_task_id() != -1:",
        "if torch._C._current_graph_task_id() < -1:",
        SMALL,
        ("transformed",),
        12,
    ),
    Mutant(
        "draw_given_in_vain",
        "The draw that a mix is given is not the one it uses.",
        "attnkit.heads:HeadMix.run",
        "if draw is None:",
        "if draw is None or self.stochastic:",
        SMALL,
        ("independence",),
    ),
    Mutant(
        "drawn_in_evaluation",
        "Evaluation counts draws and sees other windows in every pass.",
        "attnkit.heads:HeadMix.next_draw",
        "self.stochastic and self.training",
        "self.stochastic",
        SMALL,
        ("transformed",),
        12,
    ),
    Mutant(
        "anew_in_every_pass",
        "Training draws anew in every pass where it should keep its windows for some.",
        PERMUTATION,
        "self.random.resample if self.training else 1",
        "1",
        (RandomWindow(2, 2, resample=3),),
        ("seeds_only",),
    ),
]
