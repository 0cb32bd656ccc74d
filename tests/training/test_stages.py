"""The cut of a network into stages, without devices."""

import itertools

import pytest

from mtx.config import schema
from mtx.errors import UserError
from mtx.models import define_model
from mtx.training.stages import PRODUCTS_PER_NUMBER, assign_stages, shortest_supersequence, stage_costs
from tests.tiny import GPT, LLAMA, make_run

D, E = "layers", "expert_layers"


def assign(layer_stacks, num_stages, virtual_stages=1, *, dense=1.0, expert=1.0, first=0.0, last=0.0):
    costs = {D: dense, E: expert}
    stages = assign_stages(
        tuple(layer_stacks), num_stages, virtual_stages, layer_costs=costs, first_cost=first, last_cost=last
    )
    check(stages, num_stages, virtual_stages)
    return stages


def check(stages, num_stages, virtual_stages):
    """What holds for every cut."""
    assert (stages.num_stages, stages.virtual_stages) == (num_stages, virtual_stages)
    assert stages.layers.shape == (num_stages, virtual_stages, len(stages.slots))
    chunks = [stages.layers[q % num_stages, q // num_stages] for q in range(num_stages * virtual_stages)]
    assert all((chunk >= 0).any() for chunk in chunks)
    found = [(layer, stages.slots[slot]) for chunk in chunks for slot, layer in enumerate(chunk) if layer >= 0]
    assert found == list(enumerate(stages.layer_stacks))
    for stack in set(stages.slots):
        order = stages.order(stack)
        assert sorted(order[order >= 0]) == list(range(stages.layer_stacks.count(stack)))
    for slot in range(len(stages.slots)):
        assert stages.is_full(slot) == all(chunk[slot] >= 0 for chunk in chunks)


def lengths(stages):
    """Layers of each virtual stage."""
    return (stages.layers >= 0).sum(-1).T.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("num_layers", "pipe", "virtual", "expected"),
    [
        (30, 4, 1, [8, 8, 7, 7]),
        (7, 3, 1, [3, 2, 2]),
        (7, 3, 2, [2, 1, 1, 1, 1, 1]),
        (105, 35, 1, [3] * 35),
        (24, 4, 3, [2] * 12),
        (5, 5, 1, [1] * 5),
        (6, 1, 2, [3, 3]),
    ],
)
def test_equal_layers_are_cut_evenly(num_layers, pipe, virtual, expected):
    stages = assign([D] * num_layers, pipe, virtual)
    assert lengths(stages) == expected
    assert stages.slots == (D,) * max(expected)


def test_a_chunk_of_each_stage_before_the_next():
    stages = assign([D] * 7, 3, 2)
    assert stages.layers.tolist() == [[[0, 1], [4, -1]], [[2, -1], [5, -1]], [[3, -1], [6, -1]]]
    assert stages.order(D).tolist() == [0, 1, 4, -1, 2, -1, 5, -1, 3, -1, 6, -1]
    assert [stages.is_full(slot) for slot in range(2)] == [True, False]


def test_a_heavy_head_moves_layers_away_from_the_last_stage():
    assert lengths(assign([D] * 24, 4, last=2.5)) == [7, 7, 6, 4]
    assert lengths(assign([D] * 24, 4, last=100.0)) == [8, 8, 7, 1]


def test_a_heavy_embedding_moves_layers_away_from_the_first_stage():
    assert lengths(assign([D] * 24, 4, first=3.0)) == [4, 7, 7, 6]


def test_light_ends_leave_an_even_cut_alone():
    assert lengths(assign([D] * 24, 4, first=0.1, last=0.1)) == [6, 6, 6, 6]


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0.3, 2.2), (1.7, 0.4)])
@pytest.mark.parametrize(("kinds", "chunks"), [("D" * 9, 4), ("DEEEEEEEE", 3), ("DEDEDEDED", 4), ("DDEDDEDDE", 2)])
def test_no_cut_is_better(kinds, chunks, first, last):
    """Against all cuts there are: the largest cost, then the slots, then how even it is."""
    price, stacks = {"D": 1.0, "E": 1.6}, {"D": D, "E": E}

    def measure(ends):
        parts = [kinds[a:b] for a, b in itertools.pairwise(ends)]
        costs = [sum(price[kind] for kind in part) for part in parts]
        costs[0] += first
        costs[-1] += last
        slots = len(shortest_supersequence([tuple(part) for part in parts]))
        return round(max(costs), 4), slots, round(sum(cost**2 for cost in costs), 4)

    cuts = [(0, *ends, len(kinds)) for ends in itertools.combinations(range(1, len(kinds)), chunks - 1)]
    found = assign([stacks[kind] for kind in kinds], chunks, expert=1.6, first=first, last=last)
    assert measure((0, *itertools.accumulate(lengths(found)))) == min(map(measure, cuts))


def test_a_dense_layer_before_experts_gets_a_slot_on_every_stage():
    stages = assign([D] + [E] * 27, 4, expert=3.0)
    assert stages.slots == (D, *[E] * 7)
    assert lengths(stages) == [7, 7, 7, 7]
    assert stages.layers[:, 0, 0].tolist() == [0, -1, -1, -1]
    assert stages.order(E).tolist()[:8] == [0, 1, 2, 3, 4, 5, -1, 6]


def test_alternating_layers_share_their_slots():
    even = assign([D, E] * 6, 3, expert=2.0)
    assert even.slots == (D, E, D, E)
    assert all(even.is_full(slot) for slot in range(4))
    odd = assign([D, E] * 5, 2)
    assert lengths(odd) == [5, 5]
    assert len(odd.slots) == 6


@pytest.mark.parametrize("every", [2, 3, 4])
@pytest.mark.parametrize("first_dense", [0, 1, 3])
@pytest.mark.parametrize(("pipe", "virtual"), [(2, 1), (3, 2), (5, 1), (4, 3)])
def test_layers_of_two_kinds_keep_their_order(every, first_dense, pipe, virtual):
    model = schema.Model(
        vocab_size=8, d_model=8, num_layers=26, num_heads=1, max_seq_len=8,
        num_experts=4, experts_per_token=1, expert_every=every, first_dense_layers=first_dense,
    )  # fmt: skip
    assign(model.layer_stacks, pipe, virtual, expert=2.7, first=0.2, last=1.3)


@pytest.mark.parametrize(
    ("sequences", "length"),
    [(["ab", "ba"], 3), (["a", "aa", "aaa"], 3), (["aab", "b", "ab"], 3), (["abab", "baba"], 5), (["aaab", "abbb"], 6)],
)
def test_supersequences_are_shortest(sequences, length):
    found = "".join(shortest_supersequence([tuple(sequence) for sequence in sequences]))
    assert len(found) == length
    for sequence in sequences:
        letters = iter(found)
        assert all(letter in letters for letter in sequence)
    for shorter in itertools.product("ab", repeat=length - 1):
        assert not all(_is_within(sequence, shorter) for sequence in sequences)


def _is_within(sequence, longer):
    letters = iter(longer)
    return all(letter in letters for letter in sequence)


def test_too_few_layers_are_refused():
    with pytest.raises(UserError) as refused:
        assign([D] * 7, 4, 2)
    for part in ("Model.num_layers = 7", "Mesh.pipe = 4", "Pipeline.virtual_stages = 2", "product is 7 or less"):
        assert part in str(refused.value)


def costs_of(model, *, head_on_last=False, **train):
    run = make_run(model, train=train)
    return stage_costs(define_model(run.model), run, head_on_last=head_on_last)


def product(inputs, outputs):
    return inputs * outputs + PRODUCTS_PER_NUMBER * (inputs + outputs)


def test_costs_of_a_dense_model():
    d, ff, kv, vocab, seq = 32, 48, 16, 96, 16
    attention = 2 * seq * d
    gpt, llama = costs_of(GPT), costs_of(LLAMA)
    assert gpt["layer_costs"] == {D: 3 * (4 * product(d, d) + 2 * product(d, 4 * d) + attention)}
    mlp = 3 * product(d, ff)
    assert llama["layer_costs"] == {D: 3 * (2 * product(d, d) + 2 * product(d, kv) + mlp + attention)}
    assert gpt["last_cost"] == llama["last_cost"] == 0
    assert gpt["first_cost"] == 2 * llama["first_cost"] > 0  # learned positions are looked up as well
    for model in (GPT, LLAMA):  # the table is that of the embedding, or one of its own
        assert costs_of(model, head_on_last=True)["last_cost"] == 3 * product(vocab, d)


@pytest.mark.parametrize("width", [32, 1024, 20480])
def test_the_embedding_costs_less_than_a_layer_at_any_width(width):
    costs = costs_of({**GPT, "d_model": width})
    assert 0 < costs["first_cost"] < costs["layer_costs"][D] / 4


def test_computing_again_makes_layers_dearer_but_not_the_head():
    once, again = costs_of(GPT, head_on_last=True), costs_of(GPT, head_on_last=True, recompute="full")
    assert again["layer_costs"][D] == pytest.approx(once["layer_costs"][D] * 4 / 3)
    assert again["last_cost"] == once["last_cost"]


def test_longer_sequences_make_layers_dearer():
    short, long = costs_of(GPT, seq_len=8), costs_of(GPT, seq_len=16)
    assert long["layer_costs"][D] - short["layer_costs"][D] == 3 * 2 * 8 * 32


def test_only_the_experts_of_a_token_are_charged():
    routed = {**LLAMA, "num_experts": 8, "experts_per_token": 2, "expert_d_ff": 20, "first_dense_layers": 1}
    d, kv, seq = 32, 16, 16
    others = 2 * product(d, d) + 2 * product(d, kv) + 2 * seq * d
    found = costs_of(routed)["layer_costs"]
    assert found == {
        D: 3 * (others + 3 * product(d, 48)),
        E: 3 * (others + product(d, 8) + 2 * 3 * product(d, 20)),
    }
    shared = costs_of({**routed, "num_shared_experts": 1})["layer_costs"]
    assert shared[E] - found[E] == 3 * 3 * product(d, 20)


def test_a_large_vocabulary_leaves_the_last_stage_fewer_layers():
    """The whole way, from shapes to a cut."""
    run = make_run({**GPT, "num_layers": 8, "vocab_size": 2000})
    definition = define_model(run.model)
    for head_on_last, expected in ((True, [6, 2]), (False, [4, 4])):
        costs = stage_costs(definition, run, head_on_last=head_on_last)
        stages = assign_stages(run.model.layer_stacks, 2, 1, **costs)
        check(stages, 2, 1)
        assert lengths(stages) == expected
