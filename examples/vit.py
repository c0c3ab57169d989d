"""Train a ViT with three heads on synthetic images with GradVac, in a plain torch loop.

    python examples/vit.py
    deepspeed --num_gpus 2 examples/vit.py

An image shows one to four equal shapes on a noisy ground, and has three labels: the shape, its
colour, and the number of shapes. With --features, GradVac merges the gradients of the trunk's
output, which takes one backward pass of the trunk instead of three.
"""

import argparse
import os

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTModel

from fastmtl.surgery import GradientSurgery

OUTPUTS = {"shape": 3, "colour": 3, "count": 4}  # of each task's head
distance = (torch.arange(8) - 3.5).abs()
y, x = distance[:, None], distance[None, :]
SHAPES = torch.stack([y + x < 5, (y > 2) | (x > 2), (y < 1) | (x < 1)]).float()  # diamond, frame, cross

parser = argparse.ArgumentParser()
parser.add_argument("--method", default="gradvac", help="sum, pcgrad, gradvac or a method of TorchJD")
parser.add_argument("--features", action="store_true", help="merge the gradients of the trunk's output")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=32, help="images of a step, on each process")
parser.add_argument("--width", type=int, default=64, help="hidden size")
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
args = parser.parse_args()


class MultiTask(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_attention_heads": 4}
        config = ViTConfig(image_size=32, patch_size=8, num_hidden_layers=2, initializer_range=0.1, **size)
        self.trunk = ViTModel(config, add_pooling_layer=False)
        self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(args.width, n) for task, n in OUTPUTS.items()})

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images).last_hidden_state.mean(1)


def draw(rows: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Return images [rows, 3, 32, 32] and the labels of every task."""
    labels = {task: torch.randint(n, (rows,), generator=generator) for task, n in OUTPUTS.items()}
    images = 0.3 * torch.randn(rows, 3, 32, 32, generator=generator)
    shape, colour, count = labels.values()
    chosen = torch.rand(rows, 16, generator=generator).argsort(1) <= count[:, None]  # 1 to 4 of 16 squares
    squares = images.view(rows, 3, 4, 8, 4, 8)
    squares[torch.arange(rows), colour] += SHAPES[shape][:, None, :, None, :] * chosen.view(rows, 4, 1, 4, 1)
    return images.to(device), {task: label.to(device) for task, label in labels.items()}


rank, device = 0, torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
if "RANK" in os.environ:  # started by a launcher
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = MultiTask().to(device)
net = DistributedDataParallel(model) if "RANK" in os.environ else model
optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
surgery = GradientSurgery(optimizer, args.method, tasks=list(OUTPUTS), model=model.trunk)


def losses_of(z: Tensor, labels: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    return {task: (cross_entropy(head(z), labels[task], reduction="sum"), len(z)) for task, head in model.heads.items()}


generator = torch.Generator().manual_seed(1 + rank)  # other images on every process
for step in range(args.steps):
    images, labels = draw(args.batch, generator)
    if args.features:
        z = net(images)
        info = surgery.backward(losses_of(z, labels), features=z)
    else:
        with surgery.rows({tuple(OUTPUTS): len(images)}):  # every image belongs to all tasks
            z = net(images)
        info = surgery.backward(losses_of(z, labels))
    if info.skipped is None:
        optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and (step % 50 == 0 or step == args.steps - 1):
        shown = "  ".join(f"{task} {loss:.3f}" for task, loss in info.losses.items())
        conflicts = "" if info.conflict_rate is None else f"  conflicts {info.conflict_rate:.0%}"  # None with sum
        print(f"step {step:3}  {shown}{conflicts}", flush=True)

model.eval()
with torch.no_grad():
    images, labels = draw(500, torch.Generator().manual_seed(0))
    z = model(images)
if rank == 0:
    for task, head in model.heads.items():
        print(f"new images: {task} {(head(z).argmax(1) == labels[task]).float().mean():.1%}")
