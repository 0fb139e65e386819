"""Peak learning rates, chosen on the validation splits, never on the test splits.

In a file of their own, which no source digest covers: the value of a rate decides a run, and a new default here does
not make finished runs stale.
"""

# finetune.py, over 3 seeds (LoRA on the ViT: over ranks 4-32 too): of the rates whose accuracy on the new digits is
# within one image of the best, the one that keeps most of the old digits.
DIGITS = {
  "vit": {"head": 0.2, "lora": 4e-3, "full": 1e-3},
  "conv": {"head": 0.2, "lora": 4e-3, "full": 5e-4},
}

# sentence_encoder.py, the best of few after 50 steps of one seed; examples/README.md lists them. A classifier's head is
# new, and has a rate of its own.
SENTENCES = {
  "classification": {"head": 0.03, "lora": 1e-3, "lora_head": 0.03, "full": 2e-4, "full_head": 2e-4},
  "retrieval": {"head": 5e-4, "lora": 1e-3, "full": 1e-4},
}
