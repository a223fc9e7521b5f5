"""What an experiment of MoCo is, as frozen typed dataclasses with defaults.

The defaults are MoCo v2's (arXiv 2003.04297); presets in configs/ override them. Fields use the papers' words.
"""

import dataclasses
import enum


class Where(enum.Enum):
    """Where views are made from the stored images."""

    beam = "beam"  # all views come from ViewAugmenter; epoch e uses pair e modulo pairs_per_image
    trainer = "trainer"  # ViewAugmenter writes stored images only; the trainer's tf.data makes pair e in epoch e
    both = "both"  # stored pairs first; once they are used up, the trainer makes new ones


class RecipeOrder(enum.Enum):
    """The order in which a recipe applies its operations (main_moco.py)."""

    v1 = "v1"  # crop, grayscale, jitter, flip
    v2 = "v2"  # crop, jitter, grayscale, blur, flip


class Head(enum.Enum):
    """Projection head: v1 is one linear layer, v2 is linear, ReLU, linear."""

    v1 = "v1"
    v2 = "v2"


class Stem(enum.Enum):
    """First layers of the ResNet."""

    imagenet = "imagenet"  # 7x7 stride 2, then 3x3 max pooling stride 2
    cifar = "cifar"  # 3x3 stride 1, no pooling


class Schedule(enum.Enum):
    """Learning-rate schedule, stepped once an epoch as the authors do."""

    cosine = "cosine"
    step = "step"


class Precision(enum.Enum):
    """Type of the activations; parameters, BN statistics and the loss are always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class StrategyKind(enum.Enum):
    """Which cores share a global batch, see trainer_module.strategy."""

    auto = "auto"  # a TPU if one is named or attached, else the GPUs, else logical CPU devices
    tpu = "tpu"
    mirrored = "mirrored"  # the GPUs there are, else logical CPU devices
    single = "single"  # one device


class KeyBnMode(enum.Enum):
    """How the key encoder's batch normalisation is kept from seeing the query's batch (arXiv 1911.05722, 3.3)."""

    cross_replica_sum = "cross_replica_sum"  # a permutation of the global batch, moved by a sum over the replicas
    all_to_all = "all_to_all"  # random local order, equal shares to every replica, random local order
    butterfly = "butterfly"  # log2(R) stages: random local order, half the rows change places with a partner's
    auto = "auto"  # of these three the one with the least traffic, see `recommended`
    host = "host"  # key views arrive shuffled among the replicas of their host
    stored = "stored"  # statistics of an earlier key batch
    ema = "ema"  # EMAN: the momentum average of the query's running statistics
    split = "split"  # groups within each replica, keys shuffled within it; for one device
    sync = "sync"  # statistics of the global batch; does not stop the leak, for experiments
    none = "none"  # no shuffling; leaks, for experiments


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Geometry of the stored image and of the encoder's input, in pixels.

    Attributes:
        storage_size: shorter side of the stored image; the aspect ratio is kept up to max_aspect.
        max_aspect: a longer image is cropped at its centre to this ratio of sides.
        eval_resize: shorter side to which an image is resized before the centre crop of `augment.size`
            when it is embedded (evaluation, serving). 0 means augment.size * 256 / 224, as is usual.
    """

    storage_size: int = 256
    max_aspect: float = 4.0
    eval_resize: int = 0


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """The recipe of the views (main_moco.py, arXiv 2003.04297).

    Attributes:
        size: side of a view in pixels; at most image.storage_size.
        order: order of the operations, see RecipeOrder.
        crop_scale_min, crop_scale_max: share of the image's area that a random resized crop keeps.
        crop_ratio_min, crop_ratio_max: aspect ratio of the crop, width over height, drawn log-uniformly.
        brightness, contrast, saturation, hue: jitter strengths in torchvision's sense: the factor is uniform in
            [1 - s, 1 + s], the hue shift uniform in [-hue, hue] turns. The four are applied in a random order.
        jitter_probability, gray_probability, blur_probability, flip_probability: chance of each operation.
        blur_sigma_min, blur_sigma_max: standard deviation of the Gaussian blur, in pixels of the view.
        pairs_per_image: pairs of views that ViewAugmenter stores for each training image.
        where: see Where.
    """

    size: int = 224
    order: RecipeOrder = RecipeOrder.v2
    crop_scale_min: float = 0.2
    crop_scale_max: float = 1.0
    crop_ratio_min: float = 3 / 4
    crop_ratio_max: float = 4 / 3
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter_probability: float = 0.8
    gray_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma_min: float = 0.1
    blur_sigma_max: float = 2.0
    flip_probability: float = 0.5
    pairs_per_image: int = 4
    where: Where = Where.beam


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Architecture of f_q and f_k.

    Attributes:
        name: resnet18, resnet34, resnet50 or resnet101; or the dotted name of a function that returns a Keras 3 model,
            such as keras.applications.EfficientNetV2B0.
        stem: first layers of a ResNet.
        width: channels of a ResNet's first stage (64 in the paper).
        head: projection head.
        dim: size of an embedding that the loss sees (128 in the paper).
        weights: .safetensors or .npz with initial weights in torchvision's or a MoCo checkpoint's names; empty: random.
    """

    name: str = "resnet50"
    stem: Stem = Stem.imagenet
    width: int = 64
    head: Head = Head.v2
    dim: int = 128
    weights: str = ""


@dataclasses.dataclass(frozen=True)
class KeyBnConfig:
    """Batch normalisation of the key encoder.

    Attributes:
        mode: see KeyBnMode.
        groups: of each replica's batch, for `split`.
        ring: key batches whose statistics are kept, for `stored`.
    """

    mode: KeyBnMode = KeyBnMode.cross_replica_sum
    groups: int = 8
    ring: int = 8


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The labelled images that the online kNN looks at; ViewAugmenter stores them beside the views.

    Attributes:
        bank: at most so many images of the train split, those with the smallest hashes.
        queries: at most so many images of the eval split, likewise. They are never trained on.
    """

    bank: int = 10_000
    queries: int = 2_000


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What is watched while a model trains, and when an alarm is raised. Nothing here changes what is learned.

    Attributes:
        knn_epochs: epochs between two measurements of kNN top-1 on the held-out images; 0 for never.
        knn_k, knn_temperature: as in components.evaluator.config.EvaluateConfig.
        sample: see SampleConfig.
        min_embedding_std: collapse: least spread of the queries' embeddings, as a share of 1 / sqrt(dim).
        min_effective_rank: collapse: least effective rank of the newest keys.
        leak_pretext: leak: pretext top-1 above this ...
        leak_knn_drop: ... while kNN top-1 is below its best by more than this.
        max_input_share: input-bound: largest share of a step's time that may be spent waiting for views.
        patience: intervals in a row (train.log_steps each) after which collapse and a slow input are believed.
    """

    knn_epochs: int = 10
    knn_k: int = 200
    knn_temperature: float = 0.1
    sample: SampleConfig = SampleConfig()
    min_embedding_std: float = 0.02
    min_effective_rank: float = 2.0
    leak_pretext: float = 0.95
    leak_knn_drop: float = 0.05
    max_input_share: float = 0.3
    patience: int = 3


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Which TPU.

    Attributes:
        name: `local` on a TPU VM; a TPU's or a pod's name; grpc://HOST:PORT; empty for none.
        zone, project: of Google Cloud; empty for those of the machine that asks.
    """

    name: str = ""
    zone: str = ""
    project: str = ""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The MoCo step and its loop (arXiv 1911.05722, 2003.04297; main_moco.py).

    Attributes:
        replicas: logical CPU devices that share a global batch; TPUs and GPUs have the cores they have.
        strategy: see StrategyKind.
        tpu: see TpuConfig.
        global_batch: images in one step over all replicas.
        epochs: passes over the training images.
        queue: keys kept as negatives (K); any number not below global_batch.
        queue_precision: type of the queue.
        momentum: of the key encoder (m).
        temperature: of the softmax (T).
        learning_rate: at the given global batch, before the schedule.
        schedule: see Schedule.
        milestones: epochs at which the step schedule multiplies the rate by 0.1.
        sgd_momentum, weight_decay: of SGD; the decay covers every query parameter.
        precision: see Precision.
        key_bn: see KeyBnConfig.
        steps_per_loop: steps between two returns to Python; 0 chooses. Results do not depend on it.
        checkpoints: folder of the checkpoints while it trains, here or on gs://; empty for the one that the runner has.
        checkpoint_seconds: time between two periodic checkpoints; one is also written at the end.
        keep_checkpoints: the newest ones that are kept.
        log_steps: steps between two points of the curves (TensorBoard, metrics.jsonl).
        watch: see WatchConfig.
    """

    replicas: int = 2
    strategy: StrategyKind = StrategyKind.auto
    tpu: TpuConfig = TpuConfig()
    global_batch: int = 256
    epochs: int = 200
    queue: int = 65536
    queue_precision: Precision = Precision.float32
    momentum: float = 0.999
    temperature: float = 0.2
    learning_rate: float = 0.03
    schedule: Schedule = Schedule.cosine
    milestones: tuple[int, ...] = (120, 160)
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4
    precision: Precision = Precision.float32
    key_bn: KeyBnConfig = KeyBnConfig()
    steps_per_loop: int = 0
    checkpoints: str = ""
    checkpoint_seconds: float = 60.0
    keep_checkpoints: int = 2
    log_steps: int = 10
    watch: WatchConfig = WatchConfig()


def share_unit(key_bn: KeyBnConfig, replicas: int) -> int:
    """What the images of each replica must be a multiple of, for a mode that deals them out."""
    units = {KeyBnMode.all_to_all: replicas, KeyBnMode.butterfly: 2, KeyBnMode.split: key_bn.groups}
    return units.get(key_bn.mode, 1)


def dealing(key_bn: KeyBnConfig, replicas: int, share: int) -> str | None:
    """What a mode does that it cannot do with so many images, said after its name; None if it can.

    Args:
        key_bn: the mode.
        replicas: R.
        share: images of each replica, n.
    """
    mode = key_bn.mode
    if share % share_unit(key_bn, replicas) == 0 and (mode is not KeyBnMode.butterfly or is_power_of_two(replicas)):
        return None
    return {
        KeyBnMode.all_to_all: f"sends equal shares to {replicas} replicas",
        KeyBnMode.butterfly: "halves the images of each of a power of two of replicas",
        KeyBnMode.split: f"makes train.key_bn.groups={key_bn.groups} equal groups of a replica's images",
    }[mode]


def nearest_share(key_bn: KeyBnConfig, replicas: int, share: int) -> int:
    """The number of images nearest to `share` that a mode can deal out."""
    unit = share_unit(key_bn, replicas)
    return max(1, round(share / unit)) * unit


def shuffles_replicas(mode: KeyBnMode) -> bool:
    """Whether a mode shuffles key views over the replicas, and so does nothing on one."""
    return mode in (
        KeyBnMode.cross_replica_sum,
        KeyBnMode.all_to_all,
        KeyBnMode.butterfly,
        KeyBnMode.auto,
        KeyBnMode.host,
    )


def is_power_of_two(number: int) -> bool:
    """Of replicas, the mode `butterfly` needs one."""
    return number > 0 and number & (number - 1) == 0


def recommended(replicas: int, n: int) -> KeyBnMode:
    """Of the modes that move images between cores, the one with the least traffic.

    Rows that a core receives at a step: all_to_all n (R - 1) / R, butterfly n / 2 log2(R), cross_replica_sum
    2 n (R - 1), whose buffer also holds n R rows.

    Args:
        replicas: R.
        n: images of a replica.
    """
    if n % replicas == 0:
        return KeyBnMode.all_to_all
    in_halves = is_power_of_two(replicas) and n % 2 == 0
    return KeyBnMode.butterfly if in_halves else KeyBnMode.cross_replica_sum


def is_operational(key: str) -> bool:
    """Whether a setting, such as "train.log_steps", may change between two starts of one training.

    The same weights come out, but for the rounding of sums and for what batch normalisation sees where the number of
    replicas is another one. eval_resize is the export's.
    """
    return key in _OPERATIONAL or key.startswith("train.watch.")


def is_conduct(key: str) -> bool:
    """Whether a setting, such as "train.log_steps", only says how a training is carried out.

    A finished training then stands for one with another value. More may change in the midst of one, see
    `is_operational`: of `train.watch` what the alarm of a leak goes by stays out of here, since by it the model is
    judged, and what decides on how many cores it runs, since these share batch statistics.
    """
    return key in _CONDUCT


_CONDUCT = frozenset(
    {
        "train.steps_per_loop",
        "train.checkpoints",
        "train.checkpoint_seconds",
        "train.keep_checkpoints",
        "train.log_steps",
        "train.watch.max_input_share",
        "train.watch.patience",
    }
)
_OPERATIONAL = _CONDUCT | {
    "image.eval_resize",
    "train.strategy",
    "train.tpu.name",
    "train.tpu.zone",
    "train.tpu.project",
    "train.replicas",
}
