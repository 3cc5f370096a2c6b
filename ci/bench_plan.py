"""Measure how long one rank of a large job plans a sharded save, and what the ranks exchange. Starts no processes.

The state is a transformer's under FSDP2: each rank has a shard of each tensor. A plan says which bytes of the file a
rank copies, sends to other ranks, receives and writes. Each rank makes its own, from shapes and placements. The plans
of some ranks are compared: what one sends to another, the other expects.

Run it as ``PYTHONPATH=. python ci/bench_plan.py [--quick] [--ranks 1024] [--tensors 2000]``. Exit status 1 if plans do
not fit each other. The CPU time of one rank's plan, of which 50 ms are the aim, is printed and not judged.
"""

import argparse
import statistics
import sys
import time
import zlib
from collections.abc import Sequence

from distckpt.ptformat.image import ImagePlan, plan_image
from distckpt.saving.rank_plan import RankPlan, plan_rank
from distckpt.saving.sharding import ShardLayout, make_mesh

AIM_S = 0.050
NUM_SAMPLED = 32
WIDTH, WORDS = 4096, 50_257
ITEM_BYTES = 4
MIB = 2**20


def layouts_of(num_ranks: int, num_tensors: int) -> tuple[ShardLayout, ...]:
    """Return the layouts of a transformer's tensors, sharded by rows over all ranks."""
    mesh = make_mesh(tuple(range(num_ranks)), (num_ranks,))
    # Of a block: two norms, and four projections with their biases. The embedding's rows do not divide.
    block = [(WIDTH, 1), (WIDTH, 1), (3 * WIDTH, WIDTH), (3 * WIDTH, 1), (WIDTH, WIDTH), (WIDTH, 1)]
    block += [(4 * WIDTH, WIDTH), (4 * WIDTH, 1), (WIDTH, 4 * WIDTH), (WIDTH, 1)]
    shapes = [(WORDS, WIDTH), *(block[number % len(block)] for number in range(num_tensors - 1))]
    return tuple(ShardLayout(rows, columns * ITEM_BYTES, mesh, (1,), 1) for rows, columns in shapes)


def make_plan(layouts: tuple[ShardLayout, ...], writers: tuple[int, ...], rank: int) -> tuple[ImagePlan, RankPlan, int]:
    """Return the image's plan, a rank's plan, and the checksum by which ranks compare what they planned."""
    image = plan_image([layout.num_bytes for layout in layouts], (), len(layouts))
    found = plan_rank(image, layouts, writers, rank)
    return image, found, zlib.crc32(repr([layout[:2] + layout[3:] for layout in layouts]).encode())


def misfits(plans: dict[int, RankPlan]) -> list[str]:
    """Return in which pairs of ranks one does not expect what the other sends."""
    found = []
    for rank, plan in plans.items():
        for other, sent in plan.sends.items():
            if other in plans:
                expected = [one.num_bytes for one in plans[other].receives[rank]]
                if sum(expected) != sum(one.num_bytes for one in sent):
                    found.append(f"rank {rank} sends {len(sent)} parts to rank {other}, which expects {len(expected)}")
    return found


def sampled(num_ranks: int) -> Sequence[int]:
    """Return ranks in neighbouring pairs: neighbours exchange the most."""
    step = max(num_ranks // (NUM_SAMPLED // 2), 1)
    return sorted({min(first + more, num_ranks - 1) for first in range(0, num_ranks, step) for more in (0, 1)})


def main() -> int:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024, help="number of ranks (1024)")
    parser.add_argument("--tensors", type=int, default=2000, help="number of sharded tensors (2000)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the tensors")
    arguments = parser.parse_args()
    num_tensors = arguments.tensors // 10 if arguments.quick else arguments.tensors
    layouts = layouts_of(arguments.ranks, num_tensors)
    writers = (*range(1, arguments.ranks), 0)
    plans, seconds, sizes = {}, [], []
    for rank in sampled(arguments.ranks):
        plan_rank.cache_clear()
        begin = time.process_time()
        image, plans[rank], _ = make_plan(layouts, writers, rank)
        seconds.append(time.process_time() - begin)
        sizes.append(image.end)
    sent = [sum(one.num_bytes for sent in plan.sends.values() for one in sent) for plan in plans.values()]
    problems = misfits(plans)
    size = f"{sizes[0] / 2**30:.1f} GiB"
    print(f"{arguments.ranks} ranks x {num_tensors} tensors, {size}; {len(plans)} ranks planned")
    times = f"{statistics.median(seconds) * 1e3:.1f} ms (at most {max(seconds) * 1e3:.1f})"
    print(f"  one rank's plan   {times}; aim {AIM_S * 1e3:.0f} ms")
    print(f"  a rank sends      {statistics.mean(sent) / MIB:.2f} MiB (at most {max(sent) / MIB:.2f})")
    print(f"  of its share      {statistics.mean(sent) * arguments.ranks / sizes[0]:.4%}")
    for problem in problems:
        print(f"  PROBLEM: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
