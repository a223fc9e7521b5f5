"""Names and shapes in torchvision's ResNets, without fc, written down after torchvision/models/resnet.py."""

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
# What its documentation counts in all, less the 513,000 or 2,049,000 of fc.
PARAMETERS = {
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
}
OF_A_NORM = ("weight", "bias", "running_mean", "running_var")


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The state_dict's names and shapes."""
    found: dict[str, tuple[int, ...]] = {}

    def convolution(conv: str, norm: str, outputs: int, inputs: int, side: int) -> None:
        found[f"{conv}.weight"] = (outputs, inputs, side, side)
        found.update({f"{norm}.{kind}": (outputs,) for kind in OF_A_NORM})
        found[f"{norm}.num_batches_tracked"] = ()

    bottleneck = name in ("resnet50", "resnet101")
    inputs = 64
    convolution("conv1", "bn1", inputs, 3, 7)
    for stage, depth in enumerate(DEPTHS[name]):
        planes = 64 << stage
        sides, outputs = ((1, 3, 1), 4 * planes) if bottleneck else ((3, 3), planes)
        for index in range(depth):
            block, channels = f"layer{stage + 1}.{index}", [inputs, *[planes] * (len(sides) - 1), outputs]
            for at, side in enumerate(sides):
                convolution(f"{block}.conv{at + 1}", f"{block}.bn{at + 1}", channels[at + 1], channels[at], side)
            if index == 0 and inputs != outputs:
                convolution(f"{block}.downsample.0", f"{block}.downsample.1", outputs, inputs, 1)
            inputs = outputs
    return found
