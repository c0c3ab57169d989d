"""Train one text encoder on three GLUE-like tasks with PCGrad, in DeepSpeed's ZeRO 2.

python examples/glue.py
deepspeed --num_gpus 2 examples/glue.py
python examples/glue.py --model bert-base-uncased --lr 5e-5
"""

import argparse
import csv
import os
import random
from importlib.resources import files

import deepspeed
import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AutoModel, AutoTokenizer, BertConfig, PreTrainedModel, PreTrainedTokenizerFast

from fastmtl.surgery import GradientSurgery

TASKS = ["sentiment", "paraphrase", "similarity"]  # five classes; yes or no; 0 to 5

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder of an encoder; default: a small BERT with random weights")
parser.add_argument("--method", default="pcgrad", help="sum, pcgrad, gradvac or a method of TorchJD")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=16, help="rows of each task in a step, on each process")
parser.add_argument("--width", type=int, default=64, help="hidden size without --model")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
args = parser.parse_args()


class MultiTask(torch.nn.Module):
    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        sizes = {"sentiment": (width, 5), "paraphrase": (2 * width, 2), "similarity": (2 * width, 1)}
        self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(*size) for task, size in sizes.items()})

    def forward(self, texts: list[str]) -> Tensor:
        """Return the mean of the hidden states of each text."""
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(engine.device)
        mask = inputs["attention_mask"].unsqueeze(-1)
        return (self.encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)

    def scores(self, task: str, means: Tensor) -> Tensor:
        if task != "sentiment":
            first, second = means.chunk(2)
            means = torch.cat([(first - second).abs(), first * second], 1)
        return self.heads[task](means)


def read(task: str, split: str) -> list[tuple[list[str], float]]:
    """Return each row's texts, one or two, and its label."""
    lines = (files("fastmtl") / f"data/demo/{task}-{split}.csv").read_text(encoding="utf-8").splitlines()
    return [(row[2:-1], float(row[-1])) for row in csv.reader(lines[1:], delimiter="\t")]


def collate(rows: list[tuple[list[str], float]]) -> tuple[list[str], Tensor]:
    """Return all first texts, then all second ones, and the labels."""
    texts, labels = zip(*rows, strict=True)
    return [text for column in zip(*texts, strict=True) for text in column], torch.tensor(labels, device=engine.device)


def loss_of(task: str, scores: Tensor, labels: Tensor) -> Tensor:
    if task == "similarity":
        return mse_loss(scores[:, 0], labels / 5, reduction="sum")
    return cross_entropy(scores, labels.long(), reduction="sum")


torch.manual_seed(0)
train, dev = ({task: read(task, split) for task in TASKS} for split in ("train", "dev"))
if args.model:
    tokenizer, encoder = AutoTokenizer.from_pretrained(args.model), AutoModel.from_pretrained(args.model)
else:
    wordpieces = BertWordPieceTokenizer()
    words = (text for rows in train.values() for texts, _ in rows for text in texts)
    wordpieces.train_from_iterator(words, 2000, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=wordpieces._tokenizer, pad_token="[PAD]", model_max_length=64)
    size = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "max_position_embeddings": 64}
    encoder = AutoModel.from_config(BertConfig(vocab_size=2000, num_hidden_layers=2, num_attention_heads=4, **size))
if "RANK" not in os.environ:  # started without a launcher: a group of one process
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
model = MultiTask(encoder)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
settings = {"train_micro_batch_size_per_gpu": args.batch, "zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
surgery = GradientSurgery(engine, args.method, tasks=TASKS, model=model.encoder)
draw = random.Random(engine.global_rank)
for step in range(args.steps):
    batch = {task: collate(draw.sample(train[task], args.batch)) for task in TASKS}
    with surgery.rows({task: len(texts) for task, (texts, _) in batch.items()}):
        means = engine.module([text for texts, _ in batch.values() for text in texts])
    parts = means.split([len(texts) for texts, _ in batch.values()])
    losses = {}  # the sum of the rows' losses, and the number of rows
    for (task, (_, labels)), part in zip(batch.items(), parts, strict=True):
        losses[task] = loss_of(task, model.scores(task, part), labels), len(labels)
    info = surgery.backward(losses)
    if info.skipped is None:
        engine.step()
    if engine.global_rank == 0 and (step % 50 == 0 or step == args.steps - 1):
        shown = "  ".join(f"{task} {loss:.3f}" for task, loss in info.losses.items())
        conflicts = "" if info.conflict_rate is None else f"  conflicts {info.conflict_rate:.0%}"  # None with sum
        print(f"step {step:3}  {shown}{conflicts}", flush=True)

model.eval()
with torch.no_grad():
    for task in TASKS:
        texts, labels = collate(dev[task])
        scores = model.scores(task, engine.module(texts))
        metric, value = "accuracy", (scores.argmax(1) == labels).float().mean()
        if task == "similarity":
            metric, value = "correlation", torch.corrcoef(torch.stack([scores[:, 0], labels]))[0, 1]
        if engine.global_rank == 0:
            print(f"new texts: {task} {metric} {value:.2f}")
