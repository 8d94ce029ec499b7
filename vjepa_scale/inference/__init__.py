"""Use of a trained model: clips from files, features of videos, predictions, extraction over a data set, comparison.

>>> model = vjepa_scale.load_model("DIR")
"""
