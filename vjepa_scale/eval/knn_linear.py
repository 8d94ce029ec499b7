"""Is a frozen representation worth something? Few labels, held-out clips, no training of the encoder.

The same three questions are put to any features [N, F], so that a trained encoder can be set beside an
untrained one and raw pixels: how many directions do they use, does the nearest labelled neighbour share
the label, can a linear map read the label. Few labels on purpose: with thousands, a probe learns the task
by itself and hides the encoder.
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
    """exp of the entropy of the normalised singular values of the centred features [N, F].

    F for many isotropic rows, 1 where all rows lie on a line, 0 where they are equal.
    """
    centred = torch.from_numpy(features).double()
    centred = centred - centred.mean(0)
    # The triangle of a QR has the same singular values and the smaller of the two sizes.
    triangle = torch.linalg.qr(centred.T if len(centred) < centred.shape[1] else centred, mode="r").R
    return spectrum.effective_rank(torch.linalg.svdvals(triangle))


def knn_accuracy(train: Floats, train_labels: Ints, val: Floats, val_labels: Ints, *, k: int = 5) -> float:
    """Share of val rows whose k nearest labelled rows (cosine, standardised features) vote for their label."""
    scaler = StandardScaler().fit(train)
    model = KNeighborsClassifier(k, metric="cosine").fit(scaler.transform(train), train_labels)
    return float(model.score(scaler.transform(val), val_labels))


def linear_probe_accuracy(
    train: Floats, train_labels: Ints, val: Floats, val_labels: Ints, *, strength: float = 0.1
) -> float:
    """Accuracy on val of an L2-regularised logistic regression on standardised features.

    strength: scikit-learn's C, the inverse of the penalty; fixed, so that nothing is chosen on val.
    """
    scaler = StandardScaler().fit(train)
    train_rows, val_rows = scaler.transform(train), scaler.transform(val)
    # The penalised solution lies in the span of the training rows: for few labels and wide features the same
    # problem in that basis is far smaller.
    with threadpool_limits(1):  # matrices are so small that threads would only wait for each other: three times as long
        basis = np.linalg.qr(train_rows.T).Q
        model = LogisticRegression(C=strength, max_iter=2000).fit(train_rows @ basis, train_labels)
        return float(model.score(val_rows @ basis, val_labels))


def encoder_features(
    encoder: nn.Module, clips: Tensor, *, tubelet: int, mean: Sequence[float], std: Sequence[float], batch: int = 16
) -> npt.NDArray[np.float32]:
    """Tokens averaged over space, one row per clip: [N, T/tubelet · D].

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
    """The clips themselves, shrunk: uint8 [N, 3, T, H, W] -> [N, 3 · T · size²] on the scale 0 to 1."""
    N, C, T, H, W = clips.shape
    frames = clips.transpose(1, 2).reshape(N * T, C, H, W).float() / 255
    small = F.interpolate(frames, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return small.reshape(N, -1).numpy()
