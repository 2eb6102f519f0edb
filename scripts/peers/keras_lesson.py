"""The lesson in Keras, as the lesson has it; KERAS_BACKEND chooses the engine.

    KERAS_BACKEND=jax python scripts/peers/keras_lesson.py [SEED]

Prints one JSON line: seconds of `fit`, final and test figures.
"""

import json
import sys
import time

import keras
import numpy as np

if len(sys.argv) > 1:
    keras.utils.set_random_seed(int(sys.argv[1]))
(X_train, y_train), (X_test, y_test) = keras.datasets.fashion_mnist.load_data()
X_train = X_train / 255.0
X_test = X_test / 255.0
model = keras.Sequential(
    [
        keras.layers.Flatten(input_shape=(28, 28)),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
model.summary()
began = time.perf_counter()
history = model.fit(X_train, y_train, epochs=5, batch_size=32, validation_split=0.1, verbose=2)
fit_seconds = time.perf_counter() - began
test_loss, test_acc = model.evaluate(X_test, y_test, verbose=0)
print(f"test accuracy: {test_acc:.2%}")
probs = model.predict(X_test[:1], verbose=0)
print("class probabilities:", np.round(probs[0], 2))
print("best guess:", probs[0].argmax())
print(
    json.dumps(
        {
            "fit_seconds": fit_seconds,
            "test_accuracy": float(test_acc),
            "test_loss": float(test_loss),
            "accuracy": history.history["accuracy"][-1],
            "val_accuracy": history.history["val_accuracy"][-1],
        }
    )
)
