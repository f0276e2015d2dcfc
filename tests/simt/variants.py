"""The CUDA sources as the drivers compile them: as they are, and with faults planted.

Every variant of an op is the text of its `.cuh` and `.cu` in a namespace of its own, so that one
compilation holds them all. `kernel<<<grid, block, shared, stream>>>(args)` becomes `simt::launch`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LAUNCH = re.compile(r"([\w<>]+)<<<(.+?), (.+?), (.+?), (.+?)>>>\((\w+)\);")


class Mutant(NamedTuple):
    """A fault: texts to replace, each found exactly once, and what the report must then hold."""

    replacements: tuple[tuple[str, str], ...]
    report: str


def mutant(*texts: str, report: str = "mismatch") -> Mutant:
    """`texts` are old, new, old, new..."""
    return Mutant(tuple(zip(texts[::2], texts[1::2], strict=True)), report)


VERIFY_GREEDY = {
    "highest_index_wins_a_tie": mutant(
        "kMaxNodes + (kMaxNodes - 1 - i)",
        "kMaxNodes + i",
        "const int node = kMaxNodes - 1 - best % kMaxNodes;",
        "const int node = best % kMaxNodes;",
    ),
    "root_does_not_match": mutant("bool match = i == 0 && rows > 0;", "bool match = false;"),
    "root_counted_as_accepted": mutant("best / kMaxNodes - 1;", "best / kMaxNodes;"),
    "upper_nodes_not_voted": mutant(
        "for (int half = 0; half < 2; ++half) {\n    const int i = lane + 32 * half;\n    bool",
        "for (int half = 0; half < 1; ++half) {\n    const int i = lane + 32 * half;\n    bool",
    ),
    "lane_missing_in_the_mask": mutant(
        "__ballot_sync(kWarp, match)",
        "__ballot_sync(kWarp >> 1, match)",
        report="__ballot_sync: the calling lane is not in its own mask",
    ),
    "vote_in_a_branch": mutant(
        "bool match = i == 0 && rows > 0;",
        "if (i >= rows) continue;\n    bool match = i == 0;",
        report="waits for ever in __ballot_sync|lanes of one mask meet in",
    ),
    "half_a_warp_reduced": mutant("int step = 16;", "int step = 8;"),
    "mask_lacks_lanes_of_the_shuffle": mutant(
        "__shfl_xor_sync(kWarp, best, step)",
        "__shfl_xor_sync(0xffffu << (lane & 16), best, step)",
        report="__shfl_xor_sync reads a lane outside its mask",
    ),
    "one_row_too_many": mutant(
        "i > 0 && i < rows", "i > 0 && i <= rows", report="heap-buffer-overflow|mismatch"
    ),
    "padding_written_past_the_end": mutant(
        "if (i >= a.nodes) continue;", "", report="heap-buffer-overflow|mismatch"
    ),
    "invalid_target_matches": mutant("want >= 0 && a.token_ids", "a.token_ids"),
    "parent_not_checked": mutant(
        "if (p >= 0 && p < i) {", "{", report="heap-buffer-overflow|mismatch"
    ),
    "ancestors_not_checked": mutant("(bits & ok) == bits", "(bits & ok)"),
    "rank_counts_the_node_itself": mutant(
        "(uint64_t(1) << i) - 1", "(uint64_t(2) << i) - 1", report="mismatch|heap-buffer-overflow"
    ),
    "shift_in_32_bits": mutant(
        "(uint64_t(1) << i) - 1", "uint64_t(1 << i) - 1", report="runtime error: .*shift"
    ),
    "one_block_too_few": mutant("<<<args.batch,", "<<<args.batch - (args.batch > 1),"),
}

# Two threads take alternate batches of one column. Then a barrier is needed between their reads and
# their writes, which the kernel as it is does without.
COLUMN_SHARED = (
    "const int64_t column = int64_t(blockIdx.x) * kCommitThreads + threadIdx.x;",
    "const int64_t column = (int64_t(blockIdx.x) * kCommitThreads + threadIdx.x) / 2;",
    "if (column < a.batch) {",
    "if (column < a.batch && threadIdx.x % 2 == 0) {",
    "for (int first = 0; first < len; first += kBatch) {",
    "for (int pair = 0; pair < len; pair += 2 * kBatch) {\n"
    "    const int first = pair + threadIdx.x % 2 * kBatch;",
    "kCommitThreads - 1) / kCommitThreads;",
    "kCommitThreads - 1) / kCommitThreads * 2;",
)
BARRIER = (
    "      if (move[k]) row[k] = root[node * a.stride_slot];\n    }\n",
    "      if (move[k]) row[k] = root[node * a.stride_slot];\n    }\n"
    "    __syncwarp(3u << (threadIdx.x & 30));\n",
)

KV_COMMIT = {
    "column_shared_without_a_barrier": mutant(*COLUMN_SHARED),
    "last_batch_first": mutant(
        "for (int first = 0; first < len; first += kBatch) {",
        "for (int first = (len - 1) / kBatch * kBatch; first >= 0; first -= kBatch) {",
    ),
    "one_row_past_the_cache": mutant(
        "node < room", "node <= room", report="heap-buffer-overflow|mismatch"
    ),
    "one_column_too_many": mutant(
        "if (column >= columns) return;",
        "if (column > columns) return;",
        report="heap-buffer-overflow",
    ),
    "one_block_too_few": mutant(
        "(columns + kCommitThreads - 1) / kCommitThreads;",
        "columns / kCommitThreads + (columns < kCommitThreads);",
    ),
    "root_overwritten": mutant("root[(first + k + 1) *", "root[(first + k) *"),
    "root_not_counted": mutant("(len < -1 ? -1 : len) + 1;", "(len < -1 ? -1 : len);"),
    "length_below_idle": mutant("(len < -1 ? -1 : len) + 1;", "len + 1;"),
    "negative_length_of_the_cache": mutant(
        "if (start < 0) return;", "", report="heap-buffer-overflow|mismatch"
    ),
    "path_read_past_its_width": mutant(
        "len = len > a.path_width ? a.path_width : len;",
        "",
        report="heap-buffer-overflow|mismatch",
    ),
    "strides_confused": mutant(
        "head * a.stride_head",
        "head * a.stride_batch",
        report="heap-buffer-overflow|mismatch",
    ),
    "words_cut": mutant("launch<uint64_t>(args", "launch<uint32_t>(args"),
}

TREE_MASK = {
    "no_barrier_before_a_round_reads": mutant(
        "shared_above[i] = above;\n    __syncthreads();",
        "shared_above[i] = above;",
        report="mismatch|AddressSanitizer|runtime error",
    ),
    "no_barrier_before_the_status_is_read": mutant(
        "atomicOr(&shared_status, flags);\n  __syncthreads();", "atomicOr(&shared_status, flags);"
    ),
    "no_barrier_before_depths_are_read": mutant(
        "shared_depth[i] = depth;\n  __syncthreads();",
        "shared_depth[i] = depth;",
        report="runtime error|overflow|mismatch",
    ),
    "status_not_cleared": mutant("if (i == 0) shared_status = 0;", ""),
    "status_not_joined": mutant("atomicOr(&shared_status, flags)", "shared_status = flags"),
    "threads_leave_before_a_barrier": mutant(
        "const bool endless",
        "if (i >= a.nodes) return;\n  const bool endless",
        report="waits for ever in __syncthreads",
    ),
    "half_the_generations": mutant("round < 6", "round < 5"),
    "one_node_too_many": mutant(
        "if (i >= a.nodes) return;", "if (i > a.nodes) return;", report="heap-buffer-overflow"
    ),
    "node_not_on_its_own_path": mutant("node <= i", "node < i"),
    "padding_starts_late": mutant("? depth + 1 : 0;", "? depth + 2 : 0;"),
    "own_parent_allowed": mutant("parent >= i);", "parent > i);"),
    "shift_in_32_bits": mutant(
        "uint64_t(1) << i;", "uint64_t(1 << i);", report="runtime error: .*shift"
    ),
}

MUTANTS = {"tree_mask": TREE_MASK, "verify_greedy": VERIFY_GREEDY, "kv_commit": KV_COMMIT}
# Faults that ThreadSanitizer must see. Some go wrong in no order as long as threads take turns.
RACES = {
    "tree_mask": {
        "no_barrier_before_the_next_round_writes": mutant(
            "above = shared_above[above];\n    }\n    __syncthreads();",
            "above = shared_above[above];\n    }",
        ),
        **{name: fault for name, fault in TREE_MASK.items() if name.startswith("no_barrier")},
    },
    "verify_greedy": {
        "all_lanes_write_the_length": mutant("if (lane == 0) a.accept_len", "a.accept_len"),
    },
    "kv_commit": {
        "column_shared_without_a_barrier": KV_COMMIT["column_shared_without_a_barrier"],
    },
}
# Changed sources that are right: they show that a mutant fails by its fault alone.
SOUND: dict[str, dict[str, Mutant]] = {
    "tree_mask": {},
    "verify_greedy": {},
    "kv_commit": {"column_shared_with_a_barrier": mutant(*COLUMN_SHARED, *BARRIER)},
}


def source_of(op: str) -> str:
    """The op's device code and launcher, without their includes of each other."""
    text = "".join((CSRC / "cuda" / f"{op}{ext}").read_text() for ext in (".cuh", ".cu"))
    return re.sub(r'#include ".*"\n|#pragma once\n', "", text)


def planted(source: str, fault: Mutant) -> str:
    """`source` with the fault; ValueError unless every text to replace occurs exactly once."""
    for old, new in fault.replacements:
        if source.count(old) != 1:
            raise ValueError(f"{old!r} occurs {source.count(old)} times in the source, expected 1")
        source = source.replace(old, new)
    return source


def variant(source: str, name: str) -> str:
    """`source` in namespace xspec::<name>, its launches through the shim."""
    source, namespaces = re.subn(r"namespace xspec\b", f"namespace xspec::{name}", source)
    source, launches = LAUNCH.subn(r"simt::launch(\2, \3, \4, \5, [&] { \1(\6); });", source)
    if not namespaces or not launches:
        raise ValueError(f"{name}: found {namespaces} namespaces and {launches} launches")
    return source


def generate(op: str, faults: Mapping[str, Mutant]) -> str:
    """What a driver includes: `original`, SOUND's changes and `faults`, and VARIANTS(X) for all."""
    source = source_of(op)
    texts = {"original": source}
    texts |= {name: planted(source, change) for name, change in {**SOUND[op], **faults}.items()}
    parts = ['#include "api.h"\n#include "cuda/device.cuh"\n']
    parts += [variant(text, name) for name, text in texts.items()]
    parts.append("#define VARIANTS(X) " + " ".join(f"X({name})" for name in texts) + "\n")
    return "\n".join(parts)
