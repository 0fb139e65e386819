"""The parts of `sentence_encoder.py`, in reading order.

`package_text` reads docstrings, `bert` is the encoder, `loading` finds and reads its files, `text` tokenizes and
embeds, `tasks` are classification and retrieval, `training` makes one run, `results` shows them. `bert_reference.py` is
a script of its own: it computes the reference embeddings by `transformers` on torch.
"""
