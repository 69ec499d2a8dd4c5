"""Self-study: a model writes questions about texts, and the base model answers them with the text in its prompt.

    hypernet self-study --documents notes/ --base-model assets/tiny/base_model --output-dir outputs/study

`settings` says what is made, `engines` has the models that write, `study` makes the shards, `shards` writes and reads
them, and `source.SelfStudy` gives them to training.

Answers are stored with the base model's k most likely tokens at each place, so that training needs no teacher
(`hypernet.training.losses.context_distillation_kl_topk`). A shard is a parquet file that appears once it is
complete, with its provenance inside; run again, the command makes what is missing. Several processes divide
the shards among them.

Source: Charakorn et al. 2026, Doc-to-LoRA, appendix B (FineWeb-Edu, several questions per text, 16 tokens stored),
https://arxiv.org/abs/2602.15902
"""
