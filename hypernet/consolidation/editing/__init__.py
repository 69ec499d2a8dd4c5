"""Edits of single facts in closed form: the weights that a base model needs to answer one question otherwise.

moments = KeyMoments(texts, questions=questions, folder="outputs/moments")     # E[kkᵀ], kept on the disk
editor = Rome(layer=2, moments=moments)
edited = editor.edit(model, [Edit("Fenda Elfax", "Who taught Fenda Elfax?", "Orla Wint")])
with installed(model.base_model, edited.weights.tensors):                      # afterwards the same bytes as before
    model.generate(["Who taught Fenda Elfax?"])
edited = editor.edit(model, others, start=edited)                              # edits in a row
"""
