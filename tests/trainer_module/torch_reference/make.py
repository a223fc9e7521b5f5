"""Makes resnet18.npz and resnet50.npz, features of torchvision's ResNets in PyTorch, for tests to compare with.

    python3.11 -m venv /tmp/torch && /tmp/torch/bin/pip install torch==2.13.0 pillow==12.3.0
    /tmp/torch/bin/python tests/trainer_module/torch_reference/make.py

Needs pip, not uv: PyTorch's CPU build. The networks are written out here, after torchvision/models/resnet.py, so that
torchvision need not be installed. Weights are not stored: both frameworks draw each tensor from NumPy's Philox
generator, keyed by its name. The functions that the test shares need neither PyTorch nor TensorFlow.
"""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent
SHARD = FOLDER.parents[2] / "configs" / "demo_images" / "openclipart13-00000.tar"
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
IMAGES, SIZE, DIM = 8, 64, 128


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of torchvision's shape: what a network of scaled activations and of a past would hold under this name."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    draw = np.random.Generator(np.random.Philox(key=key))
    if name.endswith("running_mean"):
        value = draw.normal(0, 0.1, shape)
    elif name.endswith("running_var"):
        value = draw.uniform(0.8, 1.2, shape)
    elif len(shape) == 1:
        value = draw.normal(0, 0.1, shape) + name.endswith("weight")
        if name.endswith("bn3.weight"):  # else 16 random branches of full weight would amplify mere rounding
            value *= 0.25
    else:
        value = draw.normal(0, (1 / np.prod(shape[1:])) ** 0.5, shape)
    return value.astype(np.float32)


def images() -> np.ndarray:
    """uint8[IMAGES, SIZE, SIZE, 3]: pictures of the demo, every sixtieth of a shard."""
    with tarfile.open(SHARD) as archive:
        members = [member for member in archive if member.name.endswith(".png")][::60][:IMAGES]
        encoded = [archive.extractfile(member).read() for member in members]
    rows = [
        Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR) for data in encoded
    ]
    return np.stack([np.asarray(row) for row in rows])


def normalised(pixels: np.ndarray) -> np.ndarray:
    """uint8[N, H, W, 3] -> float32[N, H, W, 3] as ImageNet's models expect it."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((pixels / 255 - mean) / std).astype(np.float32)


def digest(pixels: np.ndarray) -> str:
    """By which a test knows that it sees the pixels that the arrays were made from."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def main() -> None:
    """Writes the arrays."""
    import torch
    from torch import nn
    from torch.nn import functional

    def conv(inputs: int, filters: int, kernel: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(inputs, filters, kernel, stride, kernel // 2, bias=False)

    class Block(nn.Module):
        """torchvision's BasicBlock or, with the expansion 4, its Bottleneck (v1.5)."""

        def __init__(self, inputs: int, filters: int, stride: int, expansion: int) -> None:
            super().__init__()
            outputs = filters * expansion
            shapes = [(filters, 3, stride), (outputs, 3, 1)]
            if expansion == 4:
                shapes = [(filters, 1, 1), (filters, 3, stride), (outputs, 1, 1)]
            self.depth, last = len(shapes), inputs
            for at, (width, kernel, step) in enumerate(shapes, 1):
                setattr(self, f"conv{at}", conv(last, width, kernel, step))
                setattr(self, f"bn{at}", nn.BatchNorm2d(width))
                last = width
            if stride != 1 or inputs != outputs:
                self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for at in range(1, self.depth + 1):
                y = getattr(self, f"bn{at}")(getattr(self, f"conv{at}")(y))
                y = functional.relu(y) if at < self.depth else y
            return functional.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))

    class ResNet(nn.Module):
        """torchvision's, whose fc is the head of MoCo v2."""

        def __init__(self, name: str) -> None:
            super().__init__()
            expansion = 4 if name == "resnet50" else 1
            self.conv1, self.bn1, self.maxpool = conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)
            inputs = 64
            for stage, blocks in enumerate(BLOCKS[name]):
                filters, layer = 64 * 2**stage, []
                for index in range(blocks):
                    layer.append(Block(inputs, filters, 2 if stage and not index else 1, expansion))
                    inputs = filters * expansion
                setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
            self.fc = nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, DIM))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
            for stage in range(1, 5):
                x = getattr(self, f"layer{stage}")(x)
            features = x.mean((2, 3))
            return features, self.fc(features)

    pixels = images()
    x = torch.from_numpy(normalised(pixels)).permute(0, 3, 1, 2).contiguous()
    for name in BLOCKS:
        model = ResNet(name)
        state = model.state_dict()
        drawn = {k: torch.from_numpy(tensor(k, tuple(v.shape))) for k, v in state.items() if v.is_floating_point()}
        model.load_state_dict(state | drawn)
        with torch.no_grad():
            inference, inference_embedding = model.eval()(x)
            training, training_embedding = model.train()(x)
        after = {k: v.numpy() for k, v in model.state_dict().items() if "running" in k}
        np.savez_compressed(
            FOLDER / f"{name}.npz",
            pixels=digest(pixels),
            names=list(state),
            inference=inference.numpy(),
            inference_embedding=inference_embedding.numpy(),
            training=training.numpy(),
            training_embedding=training_embedding.numpy(),
            statistics_names=list(after),
            # Of each layer's statistics after one training forward: mean and standard deviation over the channels.
            statistics=np.array([(v.mean(), v.std()) for v in after.values()]),
        )
        print(name, "features", inference.std().item(), training.std().item(), "torch", torch.__version__)


if __name__ == "__main__":
    main()
