"""Where the step runs: tf.distribute strategies."""

import tensorflow as tf


def make_strategy(replicas: int) -> tf.distribute.Strategy:
    """A strategy over R replicas on this machine's CPU, as logical devices.

    Raises:
        RuntimeError: TensorFlow has already started with fewer logical devices, see `prepare_devices`.
    """
    prepare_devices(replicas)
    if replicas == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def prepare_devices(replicas: int) -> None:
    """Splits the CPU into R logical devices; has to run before TensorFlow's first operation.

    Raises:
        RuntimeError: TensorFlow has already started with fewer logical devices.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    present = tf.config.get_logical_device_configuration(cpu) or []
    if len(present) < replicas and replicas > 1:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
