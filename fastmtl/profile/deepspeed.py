"""Memory that DeepSpeed 0.19 keeps by ZeRO stage and ranks, and temporary memory; in bytes.

P trained numbers of e bytes, m moments, W ranks. "bucket": the buffer in which gradients are
reduced, of reduce_bucket_size numbers; fastmtl makes it no larger than P.

    stage  weights        optimiser                gradients while backward runs
    0      P e            m P 4, + P 4 in 16 bits  P e
    1      P e            (1 + m) P 4 / W          P e and a bucket; with overlap one or two buckets
    2      P e            (1 + m) P 4 / W          a bucket (two with accumulation), P e / W
    3      P e / W, and   (1 + m) P 4 / W          P e / W and a bucket, both kept between steps
           gathered ones

Source: deepspeed/runtime/zero/stage_1_and_2.py and stage3.py; Rajbhandari et al., ZeRO, 2020 (the
formulas).
"""

from __future__ import annotations

from fastmtl.engine.settings import REDUCE_BUCKET_SIZE
from fastmtl.measure.parts import Bytes, zero_bytes
from fastmtl.profile.ledger import Ledger
from fastmtl.profile.shape import Shape

FLOAT = 4


def kept(shape: Shape) -> Bytes:
    """Return the bytes that are kept between steps by part, without task gradients.

    With offload, optimiser state is on the host, whose memory counts only if the model runs on a
    CPU.
    """
    trained, number, world = shape.trained, shape.number_bytes, shape.world
    held = zero_bytes()
    held["weights"] = shape.frozen * number
    if shape.zero == 3:
        held["weights"] += share(trained * number, world) + gathered(shape)
        held["gradients"] = share(trained * number, world) + bucket(shape)
    else:
        held["weights"] += trained * number
    ranks = 1 if shape.zero == 0 else world
    held["optimiser"] = share((shape.masters + shape.moments) * trained * FLOAT, ranks)
    if shape.offload and shape.on_gpu:
        held["optimiser"] = 0
    return held


def gathered(shape: Shape) -> int:
    """Return the bytes of the parameters that one rank of ZeRO 3 gathers from all ranks.

    Small parameters stay gathered, larger ones while stage3_max_live_parameters (10^9) allows it. A
    single rank uses its own partition.
    """
    return 0 if shape.world == 1 else shape.trained * shape.number_bytes


def bucket(shape: Shape) -> int:
    return shape.bucket * shape.number_bytes


def share(nbytes: int, world: int) -> int:
    return -(-nbytes // world)


def keeps_gradients(shape: Shape) -> bool:
    """Return whether each parameter keeps its gradient until the end of backward."""
    return shape.zero == 0 or (shape.zero == 1 and not shape.overlap)


def begin_backward(ledger: Ledger, shape: Shape, first: bool) -> None:
    """Hold the buckets of DeepSpeed's own backward of a micro-batch, which now begins.

    first: it is the first micro-batch of the step.
    """
    if shape.zero in (1, 2) and (first or shape.zero == 2):
        # In ZeRO 2 the gradients of earlier micro-batches are views of their bucket.
        ledger.hold("gradients", bucket(shape) * (2 if shape.overlap else 1))


def end_backward(ledger: Ledger, shape: Shape, last: bool) -> None:
    """Reduce the gradients of DeepSpeed's own backward of a micro-batch, which now ends.

    last: it is the last micro-batch of the step. After it, only the gradients that the optimiser
    reads are held.
    """
    number, kept_before = shape.number_bytes, kept(shape)["gradients"]
    if shape.zero == 0 and last:
        ledger.touch(min(shape.trained, REDUCE_BUCKET_SIZE) * number, "gradients")
    if shape.zero == 2:  # the next bucket is allocated before this one is freed
        ledger.touch(bucket(shape), "gradients")
        ledger.drop("gradients", ledger.held["gradients"] - kept_before - bucket(shape))
    if shape.zero == 3:  # a copy of the bucket's gradients, and another one by rank
        ledger.touch(2 * bucket(shape), "gradients")
    if shape.zero == 1 and last:
        ledger.drop("gradients", ledger.held["gradients"] - kept_before - bucket(shape))


def hand_over(ledger: Ledger, shape: Shape) -> None:
    """Hand the merged gradients to the parameters, and reduce them.

    Float32 gradients of 16-bit parameters are copied. Then the same bytes are held as after
    end_backward.
    """
    number = shape.number_bytes
    in_buckets = shape.zero == 2 or shape.overlap
    if in_buckets:
        ledger.hold("gradients", bucket(shape) * (2 if shape.overlap else 1))
    if number < FLOAT:
        wide = shape.trained - (shape.dense if shape.merged_bytes == number else 0)
        ledger.hold("gradients", wide * number)
        ledger.drop("gradients", wide * FLOAT)
    if in_buckets:  # each gradient is copied to a bucket and dropped
        ledger.drop("gradients", shape.trained * number)
        ledger.touch(bucket(shape) if shape.zero == 2 else 0, "gradients")
    else:
        # Merged gradients of one tensor stay in it until all are handed over.
        merged = (
            shape.dense * number if shape.zero and shape.storage == "stacked" and shape.merged_bytes == number else 0
        )
        buffer = bucket(shape) if shape.zero else min(shape.trained, REDUCE_BUCKET_SIZE) * number
        ledger.touch(buffer + merged, "gradients")


def reduce_in_hand(ledger: Ledger, shape: Shape) -> None:
    """Reduce gradients that are all computed and held already, in ZeRO 0 and 1."""
    buckets = bucket(shape) * (2 if shape.overlap else 1)
    ledger.touch(buckets if shape.zero else min(shape.trained, REDUCE_BUCKET_SIZE) * shape.number_bytes, "gradients")


def optimiser(ledger: Ledger, shape: Shape) -> None:
    """Clip the gradients and update the weights, one parameter group after another."""
    group = share(shape.group, shape.world if shape.zero else 1)
    narrow = shape.number_bytes < FLOAT
    decay = group * FLOAT if shape.copies_to_decay else 0
    if shape.zero == 0:
        with ledger.holding(shape.trained * FLOAT if narrow else 0, "gradients"):
            ledger.touch(decay, "gradients")
        return
    with ledger.holding(group * shape.number_bytes, "gradients"):
        ledger.touch(group * FLOAT if narrow else 0, "gradients")
    with ledger.holding(group * FLOAT, "gradients"):
        ledger.touch(decay, "gradients")
