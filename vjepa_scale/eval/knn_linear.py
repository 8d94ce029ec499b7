"""Evaluates a frozen representation with few labels and held-out clips, without training the encoder.

The measures take any features [N, F], so that a trained encoder can be compared with an untrained one and with raw
pixels: effective rank, k-NN accuracy, and accuracy of a linear probe. They use few labels, because with thousands a
probe learns the task itself and hides the quality of the encoder.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from vjepa_scale.eval import effective_rank as spectrum
from vjepa_scale.model.encoder import PixelNormaliser, pooled

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def effective_rank(features: Floats) -> float:
    """Returns exp of the entropy of the normalised singular values of the centred features [N, F].

    F for many isotropic rows, 1 where all rows lie on a line, 0 where they are equal.
    """
    centred = torch.from_numpy(features).double()
    centred = centred - centred.mean(0)
    # The R of a QR decomposition has the same singular values, and the smaller of the two sizes.
    triangle = torch.linalg.qr(centred.T if len(centred) < centred.shape[1] else centred, mode="r").R
    return spectrum.effective_rank(torch.linalg.svdvals(triangle))


def knn_accuracy(train: Floats, train_labels: Ints, val: Floats, val_labels: Ints, *, k: int = 5) -> float:
    """Returns the share of val rows whose k nearest labelled rows (cosine, standardised features) vote correctly."""
    scaler = StandardScaler().fit(train)
    model = KNeighborsClassifier(k, metric="cosine").fit(scaler.transform(train), train_labels)
    return float(model.score(scaler.transform(val), val_labels))


def linear_probe_accuracy(
    train: Floats, train_labels: Ints, val: Floats, val_labels: Ints, *, strength: float = 0.1
) -> float:
    """Returns the accuracy on val of an L2-regularised logistic regression on standardised features.

    strength: scikit-learn's C, the inverse of the penalty; fixed, so that nothing is chosen on val.
    """
    scaler = StandardScaler().fit(train)
    train_rows, val_rows = scaler.transform(train), scaler.transform(val)
    # The penalised solution is in the span of the training rows. In that basis the problem is far smaller for few
    # labels and wide features.
    with threadpool_limits(1):  # with such small matrices, several threads take three times as long
        basis = np.linalg.qr(train_rows.T).Q
        model = LogisticRegression(C=strength, max_iter=2000).fit(train_rows @ basis, train_labels)
        return float(model.score(val_rows @ basis, val_labels))


def encoder_features(
    encoder: nn.Module, clips: Tensor, *, tubelet: int, mean: Sequence[float], std: Sequence[float], batch: int = 16
) -> npt.NDArray[np.float32]:
    """Returns tokens averaged over space, one row per clip: [N, T/tubelet · D].

    encoder: normalised clips [B, 3, T, H, W] -> tokens [B, N, D], as ``load_encoder`` returns it.
    clips:   uint8 [N, 3, T, H, W];  mean, std: of the three channels, on the scale 0 to 1.
    """
    normalise = PixelNormaliser(mean, std)
    rows = []
    with torch.no_grad():
        for part in clips.split(batch):
            tokens_BND = encoder(normalise(part))
            rows.append(pooled(tokens_BND, clips.shape[2] // tubelet))
    return torch.cat(rows).numpy()


def pixel_features(clips: Tensor, *, size: int = 16) -> npt.NDArray[np.float32]:
    """Downscales the clips themselves: uint8 [N, 3, T, H, W] -> [N, 3 · T · size²] on the scale 0 to 1."""
    N, C, T, H, W = clips.shape
    frames = clips.transpose(1, 2).reshape(N * T, C, H, W).float() / 255
    small = F.interpolate(frames, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return small.reshape(N, -1).numpy()
