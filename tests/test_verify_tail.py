from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from op_cases import bits_of, chain, greedy_oracle, int32, padded, random_tree
from xspec_kernels import tree_mask
from xspec_kernels.kernels.verify_tail import (
    CACHE_FULL,
    INVALID,
    SEQUENCE,
    TOKENS,
    TailRecord,
    read_record,
    verify_tail,
)

pytestmark = pytest.mark.usefixtures("poisoned")
UNTOUCHED = -77
TIE, NAN = 1, 2


@pytest.fixture
def case(op_backend):
    if op_backend.name == "cuda":
        pytest.skip("no CUDA C++ kernel for this op")
    return op_backend


class Round:
    """One request's tree, what the target says of it, and what must come out."""

    def __init__(self, parents, tokens, targets, start, flags=None, limit=None):
        self.parents, self.tokens, self.targets = parents, tokens, targets
        self.start, self.limit = start, limit
        self.flags = flags or [0] * len(parents)

    def expected(self, slots: int) -> tuple[list[int] | None, TailRecord]:
        """(accepted nodes or None, the record without its number)."""
        rows = min(len(self.parents), max(slots - self.start, 0))
        status = CACHE_FULL * (rows < len(self.parents))
        targets = [
            -1 if flag == NAN else target
            for target, flag in zip(self.targets, self.flags, strict=True)
        ]
        path, emitted = greedy_oracle(self.parents[:rows], self.tokens[:rows], targets[:rows])
        if self.limit is not None:
            emitted = emitted[: self.limit]
            path = path[: self.limit - 1] if emitted else None
        if path is None:
            return None, TailRecord(0, status, 0, self.start, [])
        ties = sum(self.flags[node] == TIE for node in [0, *path])
        status += INVALID * (emitted[-1] < 0)
        return path, TailRecord(0, status, ties, self.start + len(emitted), emitted)


def run(rounds, case, nodes, slots=80, spare=0, layers=2, heads=1, width=4):
    """Run one op on all requests and compare every output and every bit of the caches."""
    batch, device = len(rounds), case.device
    caches = [torch.randn(batch, heads, slots, width, device=device) for _ in range(2 * layers)]
    before = [cache.clone() for cache in caches]
    starts = int32([one.start for one in rounds], device)
    root = torch.arange(100, 100 + batch, device=device)
    sequence = torch.arange(7, 7 + batch, device=device)
    record = torch.full((batch, TOKENS + nodes + spare), UNTOUCHED, device=device)

    def wide(lists, fill):
        return torch.tensor([padded(row, nodes, fill) for row in lists], device=device)

    limits = [one.limit for one in rounds]
    given_limits = any(limit is not None for limit in limits)
    got = verify_tail(
        wide([one.targets for one in rounds], 5),
        wide([one.flags for one in rounds], TIE).int(),
        wide([one.tokens for one in rounds], 5),
        int32([padded(one.parents, nodes, 0) for one in rounds], device),
        torch.tensor([bits_of(one.parents, nodes) for one in rounds], device=device),
        caches,
        starts,
        root,
        sequence,
        record,
        int32([len(one.parents) for one in rounds], device),
        max_new=int32([999 if n is None else n for n in limits], device) if given_limits else None,
        backend=case.name,
    )
    for b, one in enumerate(rounds):
        path, want = one.expected(slots)
        assert read_record(record.cpu(), b) == want._replace(sequence=8 + b)
        words = record[b].tolist()
        assert words[SEQUENCE] == sequence[b].item() == 8 + b
        assert set(words[TOKENS + len(want.tokens) :]) <= {UNTOUCHED}
        assert starts[b].item() == want.length
        assert root[b].item() == (want.tokens[-1] if want.tokens else 100 + b)
        assert got.accept_len[b].item() == (-1 if path is None else len(path))
        assert got.accept_path[b].tolist() == padded(path or [], nodes)
        for old, cache in zip(before, caches, strict=True):
            expected = old[b].clone()
            for j, node in enumerate(path or []):
                expected[:, one.start + 1 + j] = old[b][:, one.start + node]
            assert torch.equal(cache[b], expected)
    return read_record(record.cpu())


def random_round(rng, size, start, ties=True, limit=None):
    flags = [rng.choice([0, 0, 0, TIE, NAN] if ties else [0]) for _ in range(size)]
    return Round(
        random_tree(rng, size)[:size],
        [rng.randrange(2) for _ in range(size)],
        [rng.randrange(2) for _ in range(size)],
        start,
        flags,
        limit,
    )


def test_example(case):
    #     the - dog - sat        the target says: the -> cat -> ran, and hesitates over "cat"
    #        \- cat
    the, cat, dog, sat, ran = range(10, 15)
    one = Round([-1, 0, 0, 1], [the, dog, cat, sat], [cat, sat, ran, the], 3, [TIE, TIE, 0, 0])
    assert run([one], case, 4) == TailRecord(8, 0, 1, 5, [cat, ran])


@pytest.mark.parametrize("nodes", [1, 2, 5, 17, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_random_trees(batch, nodes, case, rng):
    rounds = [random_round(rng, rng.randint(0, nodes), rng.randint(0, 9)) for _ in range(batch)]
    run(rounds, case, nodes)


@pytest.mark.parametrize("nodes", [1, 2, 22, 64])
def test_all_accepted(nodes, case):
    tokens = list(range(100, 100 + nodes))
    got = run([Round(chain(nodes), tokens, [*tokens[1:], 7], 2)], case, nodes)
    assert got.tokens == [*tokens[1:], 7] and got.length == 2 + nodes


@pytest.mark.parametrize("nodes", [1, 2, 22])
def test_none_accepted(nodes, case):
    got = run([Round(chain(nodes), [1] * nodes, [2] * nodes, 2, [TIE] * nodes)], case, nodes)
    assert (got.tokens, got.length, got.near_ties) == ([2], 3, 1)


def test_every_destination_is_the_next_source(case):
    tokens = [0, 9, *range(1, 63)]
    parents = [-1, 0, 0, *range(2, 63)]
    got = run([Round(parents, tokens, [1, 0, *range(2, 63), 5], 1)], case, 64)
    assert got.tokens == [*range(1, 63), 5]


def test_all_layers_move_in_wide_rows(case, rng):
    run([random_round(rng, 9, 4, ties=False)] * 2, case, 9, layers=3, heads=2, width=40)


def test_idle_request_publishes_and_stays(case):
    idle, busy = Round([], [], [], 80), Round(chain(2), [5, 6], [6, 7], 0)
    assert run([idle, busy, idle], case, 3) == TailRecord(8, 0, 0, 80, [])


def test_record_may_be_wider(case, rng):
    run([random_round(rng, 5, 1), random_round(rng, 3, 1)], case, 5, spare=4)


@pytest.mark.parametrize("at", range(4))
def test_nan_row_is_reported_where_it_would_be_emitted(at, case):
    flags = [NAN if node == at else 0 for node in range(4)]
    got = run([Round(chain(4), [5, 6, 7, 8], [6, 7, 8, 9], 0, flags)], case, 4)
    assert (got.status, got.tokens) == (INVALID, [*[6, 7, 8, 9][:at], -1])


def test_nan_row_off_the_path_is_nobodys_business(case):
    got = run([Round([-1, 0, 0], [5, 6, 7], [7, 1, 8], 0, [0, NAN, 0])], case, 3)
    assert (got.status, got.tokens) == (0, [7, 8])


def test_negative_target_is_invalid_too(case):
    assert run([Round(chain(2), [5, 6], [-9, 7], 0)], case, 2).status == INVALID


@pytest.mark.parametrize("room", range(6))
def test_rows_beyond_the_cache_are_absent(room, case):
    tokens = [5, 6, 7, 8]
    got = run([Round(chain(4), tokens, [6, 7, 8, 9], 20 - room)], case, 4, slots=20)
    assert got.status == (CACHE_FULL if room < 4 else 0)
    assert got.tokens == [6, 7, 8, 9][: min(room, 4)]


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5])
def test_no_more_than_asked(limit, case):
    one = Round([-1, 0, 0, 2, 3], [5, 9, 6, 7, 8], [6, 1, 7, 8, 9], 3, [TIE] * 5, limit)
    free = Round(chain(2), [5, 6], [6, 7], 0)
    got = run([one, free], case, 5)
    assert got.tokens == [6, 7, 8, 9][:limit]
    assert got.near_ties == len(got.tokens)


def test_negative_limit_is_idle(case):
    made = {name: on(case.device, value) for name, value in arguments().items()}
    got = verify_tail(**made, max_new=int32([-5, 1], case.device), backend=case.name)
    assert got.accept_len.tolist() == [-1, 0]


def test_rounds_follow_each_other(case, rng):
    """Greedy decoding of a known text, round by round on the state the op keeps."""
    text = [rng.randrange(50) for _ in range(40)]
    device, nodes, slots = case.device, 8, 64
    cache = torch.full((1, 1, slots, 2), -1.0, device=device)
    seqlens, sequence = int32([0], device), torch.zeros(1, dtype=torch.int64, device=device)
    root = torch.tensor(text[:1], device=device)
    record = torch.zeros(1, TOKENS + nodes, dtype=torch.int64, device=device)
    said = text[:1]
    while len(said) + nodes < len(text):
        start = len(said) - 1
        parents = random_tree(rng, nodes)
        depth = tree_mask(int32([parents]), backend="torch").depth[0].tolist()
        right = [text[start + d] for d in depth]
        tokens = [right[i] if i == 0 or rng.random() < 0.7 else 60 for i in range(nodes)]
        assert root.item() == tokens[0] and seqlens.item() == start
        cache[0, 0, start : start + nodes] = torch.tensor(tokens, device=device).float()[:, None]
        mask = tree_mask(int32([parents]), backend="torch")
        verify_tail(
            torch.tensor([[text[start + d + 1] for d in depth]], device=device),
            torch.zeros(1, nodes, dtype=torch.int32, device=device),
            torch.tensor([tokens], device=device),
            int32([parents], device),
            mask.ancestor_bits.to(device),
            [cache],
            seqlens,
            root,
            sequence,
            record,
            backend=case.name,
        )
        said += read_record(record.cpu()).tokens
        assert said == text[: len(said)]
        assert cache[0, 0, : seqlens.item(), 0].tolist() == said[:-1]
        assert read_record(record.cpu()).sequence == sequence.item()


@given(data=st.data())
def test_against_oracle(data, case):
    nodes = data.draw(st.integers(1, 64))
    rounds = []
    for _ in range(data.draw(st.integers(1, 2))):
        rows = data.draw(st.integers(0, nodes))
        spread = data.draw(st.integers(1, 64))
        words = st.lists(st.integers(0, 2**16), min_size=rows, max_size=rows)
        picks, flags = data.draw(words), data.draw(words)
        rounds.append(
            Round(
                [i - 1 - pick % min(i, spread) if i else -1 for i, pick in enumerate(picks)],
                [pick // 64 % 2 for pick in picks],
                [pick // 128 % 2 for pick in picks],
                data.draw(st.integers(0, 40)),
                [flag % 7 if flag % 7 in (TIE, NAN) else 0 for flag in flags],
                data.draw(st.none() | st.integers(0, nodes + 1)),
            )
        )
    run(rounds, case, nodes, slots=40 + data.draw(st.integers(0, 40)), layers=1)


def on(device, value):
    return value.to(device) if isinstance(value, torch.Tensor) else [x.to(device) for x in value]


def arguments(**changes):
    made = {
        "target_ids": torch.zeros(2, 4, dtype=torch.int64),
        "flags": torch.zeros(2, 4, dtype=torch.int32),
        "token_ids": torch.zeros(2, 4, dtype=torch.int64),
        "parent_idx": int32([chain(4)] * 2),
        "ancestor_bits": torch.tensor([bits_of(chain(4), 4)] * 2),
        "caches": [torch.zeros(2, 1, 8, 4), torch.ones(2, 1, 8, 4)],
        "cache_seqlens": int32([0, 0]),
        "root": torch.zeros(2, dtype=torch.int64),
        "sequence": torch.zeros(2, dtype=torch.int64),
        "record": torch.zeros(2, TOKENS + 4, dtype=torch.int64),
    }
    return made | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": torch.zeros(2, 65, dtype=torch.int64)}, "token_ids has shape"),
        ({"token_ids": torch.zeros(2, 4, dtype=torch.int32)}, "token_ids is torch.int32"),
        ({"target_ids": torch.zeros(8, dtype=torch.int64)}, r"target_ids has shape \[8\]"),
        ({"flags": torch.zeros(2, 4, dtype=torch.int64)}, "flags is torch.int64"),
        ({"ancestor_bits": torch.zeros(2, 8, dtype=torch.int64)[:, ::2]}, "contiguous"),
        ({"caches": []}, "caches is empty"),
        ({"caches": [torch.zeros(1, 1, 8, 4)]}, r"expected \[2, H_kv, S, D\]"),
        ({"cache_seqlens": torch.zeros(2, dtype=torch.int64)}, "cache_seqlens is torch.int64"),
        ({"root": torch.zeros(2, dtype=torch.int32)}, "root is torch.int32"),
        ({"sequence": torch.zeros(1, dtype=torch.int64)}, "sequence has shape"),
        ({"record": torch.zeros(2, 8, dtype=torch.int64)}, r"\[2, W\] with W >= 9"),
        ({"record": torch.zeros(2, 9)}, "record is torch.float32"),
        ({"record": torch.zeros(2, 9, dtype=torch.int64, device="meta")}, "record is on meta"),
        ({"num_rows": torch.zeros(2)}, "num_rows is torch.float32"),
        ({"max_new": torch.zeros(3, dtype=torch.int32)}, "max_new has shape"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        verify_tail(**arguments(**changes))


def test_records_that_cannot_be_read():
    for record, request in ((torch.zeros(0, 9), 0), (torch.zeros(9), 0), (torch.zeros(2, 9), 2)):
        with pytest.raises(ValueError, match="read_record: record has shape"):
            read_record(record.long(), request)


def test_opcheck():
    made = (*arguments().values(), int32([4, 3]), int32([9, 2]), "auto")
    torch.library.opcheck(torch.ops.xspec.verify_tail, made)
