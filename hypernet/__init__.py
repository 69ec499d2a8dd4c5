"""Doc-to-LoRA: a document becomes LoRA weights in one forward pass of a hypernetwork.

Axis letters, the same in every einops pattern, docstring and comment:
`C` chunks, `N` documents, `Q` questions, `T` chunk tokens, `S` prompt tokens, `L` layers, `M` target modules,
`R` rank, `K` latents, `D` feature, `H` latent size.

    from hypernet.doc_to_lora import DocToLoRA

    model = DocToLoRA.from_pretrained("assets/tiny")
    adapter = model.internalize(open("document.txt").read())
    print(model.generate(["Who founded the company?"], adapter))
"""

__version__ = "0.1.0"
