"""What a trained representation is worth: attentive probes, k-NN and linear probes, effective rank."""
