"""MoCo in PyTorch, which the benchmarks `parity` and `train` compare with.

Run by the Python of .venv-torch alone; it imports nothing of this project, and nothing of this project imports it. It
follows facebookresearch/moco's builder.py and main_moco.py (arXiv 1911.05722, 2003.04297) in what they compute and in
which order; on one device, where that code has one process per GPU, the groups of batch normalisation are emulated.

Each line on standard input is answered with one line of JSON:
    _torch_moco.py parity FOLDER             float32 or float64: trains on FOLDER's views in it, answers the losses
    _torch_moco.py speed SETTINGS_AS_JSON    a number: trains for so many steps, answers the seconds
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return functional.relu(y.add_(x if self.downsample is None else self.downsample(x)), inplace=True)


class Encoder(nn.Module):
    """ResNet-18 with the CIFAR stem and MoCo v2's head."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width * 2**stage for stage in range(4)]
        for stage, (inputs, outputs) in enumerate(zip([width, *widths], widths, strict=False)):
            blocks = [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Sequential(nn.Linear(widths[-1], widths[-1]), nn.ReLU(), nn.Linear(widths[-1], dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, dim]."""
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class MoCo(nn.Module):
    """The builder: two encoders, a queue of keys [dim, K], and the step's forward."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.m, self.temperature, self.groups = settings["m"], settings["temperature"], settings["groups"]
        self.encoder_q = Encoder(settings["width"], settings["dim"])
        self.encoder_k = Encoder(settings["width"], settings["dim"])
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        queue = torch.randn(settings["dim"], settings["queue"])
        self.register_buffer("queue", functional.normalize(queue, dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def encode(self, encoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Each group is what one GPU would normalise."""
        embeddings = torch.cat([encoder(group) for group in x.chunk(self.groups)])
        return functional.normalize(_at_least_float32(embeddings), dim=1)

    def forward(self, im_q: torch.Tensor, im_k: torch.Tensor, shuffle: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits, N x (1 + K), and labels."""
        q = self.encode(self.encoder_q, im_q)  # NxC
        with torch.no_grad():
            for of_q, of_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
                of_k.mul_(self.m).add_(of_q, alpha=1 - self.m)
            k = self.encode(self.encoder_k, im_k[shuffle])[torch.argsort(shuffle)]
        l_pos = torch.einsum("nc,nc->n", q, k)[:, None]
        l_neg = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([l_pos, l_neg], dim=1) / self.temperature
        self._dequeue_and_enqueue(k)
        return logits, torch.zeros(len(logits), dtype=torch.long)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: torch.Tensor) -> None:
        at, capacity = int(self.queue_ptr), self.queue.shape[1]
        if capacity % len(keys):
            raise ValueError("the original wants a queue that is a multiple of the batch")
        self.queue[:, at : at + len(keys)] = keys.T
        self.queue_ptr[0] = (at + len(keys)) % capacity


class Trainer:
    """main_moco.py's loop body."""

    def __init__(self, settings: dict[str, Any], dtype: torch.dtype = torch.float32, autocast: bool = False) -> None:
        self.moco = MoCo(settings).train()
        for encoder in (self.moco.encoder_q, self.moco.encoder_k):
            encoder.to(dtype=dtype, memory_format=torch.channels_last)
        self.moco.queue = self.moco.queue.to(torch.promote_types(dtype, torch.float32))
        self.optimizer = torch.optim.SGD(
            self.moco.encoder_q.parameters(),
            settings["learning_rate"],
            momentum=settings["sgd_momentum"],
            weight_decay=settings["weight_decay"],
        )
        self._dtype, self._autocast = dtype, autocast
        self._mean, self._std = (torch.tensor(settings[name], dtype=torch.float32) for name in ("mean", "std"))

    def step(self, views: torch.Tensor, shuffle: torch.Tensor) -> torch.Tensor:
        """One step on views, uint8[2, N, H, W, 3]; returns the loss."""
        with torch.autocast("cpu", torch.bfloat16) if self._autocast else contextlib.nullcontext():
            logits, labels = self.moco(*map(self._normalise, views), shuffle)
        loss = functional.cross_entropy(_at_least_float32(logits), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _normalise(self, views: torch.Tensor) -> torch.Tensor:
        """[N, H, W, 3] -> [N, 3, H, W], channels last in memory."""
        return ((views.float() - self._mean) / self._std).to(self._dtype).permute(0, 3, 1, 2)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def parity(folder: Path) -> Callable[[str], list[float]]:
    """Losses of the steps on FOLDER's views, from FOLDER's weights and with its permutations, in the type asked for."""
    settings = json.loads((folder / "settings.json").read_text())
    views = torch.from_numpy(np.load(folder / "views.npy"))
    shuffles = torch.from_numpy(np.load(folder / "permutations.npy")).long()

    def losses(dtype: str) -> list[float]:
        trainer = Trainer(settings, dtype=getattr(torch, dtype))
        with np.load(folder / "start.npz") as start:
            trainer.moco.load_state_dict({name: torch.from_numpy(start[name]) for name in start.files})
        return [float(trainer.step(pair, shuffle)) for pair, shuffle in zip(views, shuffles, strict=True)]

    return losses


def speed(settings: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """Seconds of so many steps; in bfloat16 by autocast or with a bfloat16 model, whichever is faster here."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, settings["batch"], settings["side"], settings["side"], 3)
    views = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def seconds(trainer: Trainer, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            trainer.step(views, torch.randperm(settings["batch"])).item()
        return time.perf_counter() - start

    def warm_seconds(trainer: Trainer) -> float:
        seconds(trainer, 1)
        return seconds(trainer, 1)

    if settings["precision"] == "float32":
        trainers = {"float32": Trainer(settings)}
    else:
        trainers = {"autocast": Trainer(settings, autocast=True), "model": Trainer(settings, dtype=torch.bfloat16)}
    took = {way: warm_seconds(trainer) for way, trainer in trainers.items()}
    fastest = min(took, key=lambda way: took[way])
    return lambda steps: {"seconds": seconds(trainers[fastest], int(steps)), "way": fastest}


def main() -> None:
    """Answers the lines on standard input."""
    what, argument, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    answer = parity(Path(argument)) if what == "parity" else speed(json.loads(argument))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(line.strip())) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
