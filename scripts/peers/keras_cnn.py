"""The convolutional network of Keras' first example, "Simple MNIST convnet", on Fashion-MNIST.

    KERAS_BACKEND=jax python scripts/peers/keras_cnn.py [SEED]

Prints one JSON line: seconds of `fit`, and test accuracy.
"""

import json
import sys
import time

import keras

if len(sys.argv) > 1:
    keras.utils.set_random_seed(int(sys.argv[1]))
(X_train, y_train), (X_test, y_test) = keras.datasets.fashion_mnist.load_data()
X_train = X_train[..., None].astype("float32") / 255
X_test = X_test[..., None].astype("float32") / 255
model = keras.Sequential(
    [
        keras.Input(shape=(28, 28, 1)),
        keras.layers.Conv2D(32, kernel_size=(3, 3), activation="relu"),
        keras.layers.MaxPooling2D(pool_size=(2, 2)),
        keras.layers.Conv2D(64, kernel_size=(3, 3), activation="relu"),
        keras.layers.MaxPooling2D(pool_size=(2, 2)),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
model.compile(loss="sparse_categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
began = time.perf_counter()
model.fit(X_train, y_train, batch_size=128, epochs=15, validation_split=0.1, verbose=2)
fit_seconds = time.perf_counter() - began
_, accuracy = model.evaluate(X_test, y_test, verbose=0)
print(json.dumps({"fit_seconds": fit_seconds, "test_accuracy": float(accuracy)}))
