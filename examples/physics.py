"""Fit a physics-informed network with three losses on the same points, in a plain torch loop.

    python examples/physics.py
    deepspeed --num_gpus 2 examples/physics.py

A rod of length 1 cools down. The network (x, t) -> (temperature u, flux q) and the conductivity k
are learned from noisy measurements of u and two equations, all on the same points:

    measured   u = measurement      balance   du/dt + dq/dx = 0      fourier   q + k du/dx = 0
"""

import argparse
import math
import os

import torch
from torch import Tensor, nn

from fastmtl.surgery import GradientSurgery

TASKS = ["measured", "balance", "fourier"]
CONDUCTIVITY = 0.1  # which the network has to find

parser = argparse.ArgumentParser()
parser.add_argument("--method", default="pcgrad", help="sum, pcgrad, gradvac or a method of TorchJD")
parser.add_argument("--steps", type=int, default=3000)
parser.add_argument("--points", type=int, default=256, help="points of a step, on each process")
parser.add_argument("--width", type=int, default=64, help="hidden size")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
args = parser.parse_args()

rank, device = 0, torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
if "RANK" in os.environ:  # started by a launcher
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = torch.distributed.get_rank()

torch.manual_seed(0)  # the same weights on every process
layers = [nn.Linear(2, args.width), nn.Tanh(), nn.Linear(args.width, args.width), nn.Tanh(), nn.Linear(args.width, 2)]
net = nn.Sequential(*layers).to(device)
k = nn.Parameter(torch.tensor(1.0, device=device))
optimizer = torch.optim.AdamW([*net.parameters(), k], lr=args.lr, weight_decay=0.0)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
# The losses contain derivatives of the network, which are backward passes themselves. A pass for
# all tasks cannot be differentiated again, so each loss has a backward pass of its own.
surgery = GradientSurgery(optimizer, args.method, tasks=TASKS, shared=list(net.parameters()), passes="per_task")


def exact(points: Tensor) -> Tensor:
    """Return the temperature. points: (x, t) [N, 2]."""
    x, t = points.unbind(1)
    return torch.exp(-CONDUCTIVITY * math.pi**2 * t) * torch.sin(math.pi * x)


def losses_of(points: Tensor, measured: Tensor) -> dict[str, tuple[Tensor, int]]:
    points.requires_grad_()
    u, q = net(points).unbind(1)
    (du,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (dq,) = torch.autograd.grad(q.sum(), points, create_graph=True)
    errors = {"measured": u - measured, "balance": du[:, 1] + dq[:, 0], "fourier": q + k * du[:, 0]}
    return {task: (error.square().sum(), len(points)) for task, error in errors.items()}


generator = torch.Generator(device).manual_seed(rank)  # other points on every process
for step in range(args.steps):
    points = torch.rand(args.points, 2, generator=generator, device=device)
    noise = torch.randn(args.points, generator=generator, device=device)
    info = surgery.backward(losses_of(points, exact(points) + 0.05 * noise))
    if info.skipped is None:
        optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    if rank == 0 and (step % 500 == 0 or step == args.steps - 1):
        shown = "  ".join(f"{task} {loss:.4f}" for task, loss in info.losses.items())
        conflicts = "" if info.conflict_rate is None else f"  conflicts {info.conflict_rate:.0%}"  # None with sum
        print(f"step {step:4}  {shown}{conflicts}  k {k.item():.3f}", flush=True)

with torch.no_grad():
    points = torch.cartesian_prod(torch.linspace(0, 1, 51), torch.linspace(0, 1, 51)).to(device)
    error = (net(points)[:, 0] - exact(points)).square().mean().sqrt()
if rank == 0:
    print(f"error of u {error:.4f}, k {k.item():.3f} (exact {CONDUCTIVITY})")
