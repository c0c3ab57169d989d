"""Tune a small Llama with LoRA on three sets of instructions with PCGrad, in DeepSpeed's ZeRO 3.

    python examples/llama_lora.py
    deepspeed --num_gpus 2 examples/llama_lora.py

The model reads an instruction and a word, such as "reverse:face=", and answers "ecaf". Its frozen
weights are random, so the embeddings and the output layer are trained beside the LoRA.
"""

import argparse
import os
import random

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from fastmtl.surgery import GradientSurgery

TASKS = {"copy": lambda word: word, "reverse": lambda word: word[::-1], "sort": lambda word: "".join(sorted(word))}
CHARACTERS = "\n=:abcdefghijklmnopqrstuvwxyz"  # a line break is padding, and ends an answer

parser = argparse.ArgumentParser()
parser.add_argument("--method", default="pcgrad", help="sum, pcgrad, gradvac or a method of TorchJD")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch", type=int, default=32, help="rows of each task in a step, on each process")
parser.add_argument("--width", type=int, default=64, help="hidden size")
parser.add_argument("--rank", type=int, default=16, help="rank of LoRA")
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
args = parser.parse_args()


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(character) for character in text]


def draw(task: str, rows: int) -> tuple[Tensor, Tensor]:
    """Return ids and labels [rows, 24]; the label of a token outside of the answer is -100."""
    ids, labels = torch.zeros(rows, 24, dtype=torch.long), torch.full((rows, 24), -100)
    for row in range(rows):
        word = "".join(chances.choices("abcdefgh", k=4))
        question, answer = encode(f"{task}:{word}="), encode(TASKS[task](word) + "\n")
        ids[row, : len(question) + len(answer)] = torch.tensor(question + answer)
        labels[row, len(question) : len(question) + len(answer)] = torch.tensor(answer)
    return ids.to(engine.device), labels.to(engine.device)


def loss_fn(batch: dict[str, tuple[Tensor, Tensor]], model: torch.nn.Module) -> dict[str, tuple[Tensor, int]]:
    ids = torch.cat([ids for ids, _ in batch.values()])
    with surgery.rows({task: len(ids) for task, (ids, _) in batch.items()}):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = {}
    for (task, (_, labels)), scores in zip(batch.items(), logits.split(args.batch), strict=True):
        tokens = cross_entropy(scores[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        losses[task] = tokens.sum() / 5, args.batch  # mean over the tokens of an answer, summed over the rows
    return losses


if "RANK" not in os.environ:  # started without a launcher: a group of one process
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
torch.manual_seed(0)
llama = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
)
lora = LoraConfig(
    r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", modules_to_save=["lm_head", "embed_tokens"]
)
model = get_peft_model(llama, lora)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(trained, lr=args.lr),
    config={
        "train_micro_batch_size_per_gpu": 3 * args.batch,
        "zero_optimization": {"stage": 3},
        "gradient_clipping": 1.0,
    },
)
surgery = GradientSurgery(engine, args.method, tasks=list(TASKS), model=llama.model)

chances = random.Random(engine.global_rank)  # other words on every process
for step in range(args.steps):
    info = surgery.run([{task: draw(task, args.batch) for task in TASKS}], loss_fn)
    if info.skipped is None:
        engine.step()
    if engine.global_rank == 0 and (step % 20 == 0 or step == args.steps - 1):
        shown = "  ".join(f"{task} {loss:.3f}" for task, loss in info.losses.items())
        conflicts = "" if info.conflict_rate is None else f"  conflicts {info.conflict_rate:.0%}"  # None with sum
        print(f"step {step:3}  {shown}{conflicts}", flush=True)

model.eval()
with torch.no_grad():
    for task in TASKS:
        ids, labels = draw(task, 100)
        found = engine.module(input_ids=ids).logits[:, :-1].argmax(-1)
        answer = labels[:, 1:] != -100
        right = (found == labels[:, 1:])[answer].float().mean().item()
        if engine.global_rank == 0:
            print(f"new words: {task} {right:.1%} of the letters")
