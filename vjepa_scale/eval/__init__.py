"""Evaluation of a trained representation: attentive probes, k-NN and linear probes, effective rank."""
