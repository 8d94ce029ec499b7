"""What users of a trained model do with it: clips from files, features of videos, predictions, and all of a data set.

>>> model = vjepa_scale.load_model("DIR")
"""
