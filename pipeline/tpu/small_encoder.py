"""Small residual encoders that compile in seconds: what budgets and the proof of the lowered step are made with."""

import keras


def two_convolutions(input_shape: tuple[int, int, int]) -> keras.Model:
    """conv3x3 / 2 -> BN -> ReLU -> residual (conv3x3 -> BN) -> ReLU: [N, H, W, 3] -> [N, H / 2, W / 2, 6]."""
    image = keras.Input(input_shape)
    x = keras.layers.Conv2D(6, 3, strides=2, use_bias=False)(keras.layers.ZeroPadding2D(1)(image))
    x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))
    y = keras.layers.Conv2D(6, 3, padding="same", use_bias=False)(x)
    y = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(y)
    return keras.Model(image, keras.layers.ReLU()(keras.layers.Add()([x, y])))


def bottleneck(input_shape: tuple[int, int, int]) -> keras.Model:
    """conv3x3 / 2 -> BN -> ReLU, then a ResNet's first bottleneck block: [N, H, W, 3] -> [N, H / 2, W / 2, 16]."""

    def conv_norm(x: keras.KerasTensor, filters: int, kernel: int) -> keras.KerasTensor:
        x = keras.layers.Conv2D(filters, kernel, padding="same", use_bias=False)(x)
        return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    def relu(x: keras.KerasTensor) -> keras.KerasTensor:
        return keras.layers.ReLU()(x)

    image = keras.Input(input_shape)
    x = keras.layers.Conv2D(4, 3, strides=2, use_bias=False)(keras.layers.ZeroPadding2D(1)(image))
    x = relu(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))
    y = conv_norm(relu(conv_norm(relu(conv_norm(x, 4, 1)), 4, 3)), 16, 1)
    return keras.Model(image, relu(keras.layers.Add()([conv_norm(x, 16, 1), y])))
