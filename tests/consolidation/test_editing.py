"""Edits in closed form, against their formulas in float64; rank, undoing, what is kept on the disk, refused inputs."""

import numpy as np
import pytest
import torch

from hypernet.base.base_model import build_base_model, fingerprint
from hypernet.consolidation.editing.edits import Edit, at_subjects, edit_rows, editable, mean_by_owner
from hypernet.consolidation.editing.memit import AlphaEdit, Memit, null_space, projected, spread
from hypernet.consolidation.editing.moments import KeyMoments
from hypernet.consolidation.editing.rome import Rome, damped, random_like, rank_one, solved
from hypernet.consolidation.editing.trace import causal_trace
from hypernet.consolidation.editing.values import ValueSearch, answer_nll, at_places
from hypernet.consolidation.weights import MovedWeights, installed

D_FF = 48
TEXTS = [f"Norbach {i} lies on the river Palno, and {i * 7} people live there. Who knows {i}?" for i in range(30)]
EDITS = [
    Edit("Fenda Elfax", "Who taught Fenda Elfax?", "Orla Wint"),
    Edit("Norbach", "Where does Norbach lie, then?", "Ilm"),
    Edit("Tolmar", "Which river is Tolmar beside?", "Vess"),
]
SEARCH = {"steps": 8, "lr": 0.3, "enough": 0.0}


@pytest.fixture
def served(make_doc_to_lora, tiny_base_model):
    """A model of four blocks in float32."""
    config = {**tiny_base_model.config.to_dict(), "num_hidden_layers": 4}
    base_model = build_base_model(config, seed=2)
    with torch.no_grad():
        for parameter in base_model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return make_doc_to_lora(base_model=base_model, bias_block=False).eval().requires_grad_(False)


@pytest.fixture
def model(served):
    """In float64, so that rounding hides nothing."""
    return served.double()


@pytest.fixture
def moments():
    return KeyMoments(TEXTS, questions=["Who?", "Where does it lie?"])


def keys_by_hand(model, ids, layer):
    """What enters a block's down projection, [S, d_ff], from its own two projections."""
    block, entered = model.base_model.get_decoder().layers[layer].mlp, []
    hook = block.register_forward_pre_hook(lambda _, args: entered.append(args[0][0].numpy()))
    with torch.no_grad():
        model.base_model(torch.tensor([ids]))
    hook.remove()
    gate, up = (getattr(block, name).weight.numpy() for name in ("gate_proj", "up_proj"))
    z = entered[0] @ gate.T
    return z / (1 + np.exp(-z)) * (entered[0] @ up.T)


def prompt_of(model, edit):
    return model.layout.prompt_ids(model.tokenizer, [edit.question])[0]


def random_case(seed, d_out=7, d_in=11, num=3):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    seen = draw(40, d_in)
    return draw(d_out, d_in), draw(num, d_in), draw(num, d_out), seen.T @ seen / 40


# --- Formulas ---


def test_rank_one_is_the_constrained_minimum():
    """W' k* = v*, and by Lagrange's equations (W' - W) C is a multiple of λ k*ᵀ."""
    weight, keys, values, moment = random_case(0)
    change = rank_one(weight, keys[0], values[0], moment)
    torch.testing.assert_close((weight + change) @ keys[0], values[0], atol=1e-10, rtol=0)
    W, k, v, C = (x.numpy() for x in (weight, keys[0], values[0], moment))
    # KKT system of min tr((X - W) C (X - W)ᵀ) with X k = v, a row of X at a time.
    for row in range(len(W)):
        system = np.block([[C, k[:, None]], [k[None], np.zeros((1, 1))]])
        solution = np.linalg.solve(system, np.append(C @ W[row], v[row]))
        np.testing.assert_allclose((weight + change)[row].numpy(), solution[:-1], atol=1e-9)


def test_spread_is_the_regularised_least_squares():
    weight, keys, left, moment = random_case(1)
    change = spread(left, keys, 2.5 * moment).numpy()
    K, R, C = keys.numpy(), left.numpy(), 2.5 * moment.numpy()
    # A row of ΔW minimises ‖K x - r‖² + xᵀ C x: one stacked least-squares problem, without the normal equations.
    root = np.linalg.cholesky(C).T
    for row in range(len(change)):
        stacked = np.vstack([K, root]), np.append(R[:, row], np.zeros(len(C)))
        np.testing.assert_allclose(change[row], np.linalg.lstsq(*stacked, rcond=None)[0], atol=1e-9)


def test_null_space_holds_low_eigenvectors_alone():
    values = torch.tensor([1e-4, 5e-3, 0.5, 1.0], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    found = null_space(basis @ torch.diag(values) @ basis.T, 1e-2)
    torch.testing.assert_close(found, basis[:, :2] @ basis[:, :2].T, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="No eigenvalue of C is below 1e-06 of the largest. Set threshold higher"):
        null_space(torch.eye(3, dtype=torch.float64), 1e-6)


def test_projected_is_the_minimum_in_the_null_space():
    """ΔW = X P with X P minimising ‖K (X P)ᵀ - R‖² + ‖K_p (X P)ᵀ‖² + weight ‖X P‖²."""
    _, keys, left, _ = random_case(2)
    seen = random_case(3)[1][:2]
    basis = torch.linalg.qr(torch.randn(11, 6, dtype=torch.float64))[0]
    change = projected(left, keys, basis @ basis.T, seen.T @ seen, 0.3).numpy()
    K, R, P, Q = keys.numpy(), left.numpy(), seen.numpy(), basis.numpy()
    for row in range(len(change)):
        stacked = np.vstack([K @ Q, P @ Q, 0.3**0.5 * np.eye(6)])
        target = np.concatenate([R[:, row], np.zeros(2 + 6)])
        np.testing.assert_allclose(change[row], Q @ np.linalg.lstsq(stacked, target, rcond=None)[0], atol=1e-9)


def test_projected_leaves_the_other_keys_alone():
    _, keys, left, _ = random_case(4)
    others = torch.randn(5, 11, dtype=torch.float64)  # span 5 of 11 dimensions
    moment = others.T @ others
    change = projected(left, keys, null_space(moment, 1e-9), torch.zeros_like(moment), 1e-3)
    assert (change @ others.T).abs().max() < 1e-9 < 0.1 < (change @ keys.T).abs().max()


def test_singular_moments_are_refused():
    moment = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="C = E.kkᵀ. is singular: give more texts .* or damping above 0"):
        solved(moment, torch.ones(3, 1, dtype=torch.float64))
    assert damped(torch.eye(3) * 2, 0.5).tolist() == (torch.eye(3) * 3).tolist()


# --- Keys and their moments ---


def test_moments_are_the_mean_over_all_tokens(model, moments):
    (path,) = editable(model, [1])
    rows = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    rows += model.layout.prompt_ids(model.tokenizer, ["Who?", "Where does it lie?"])
    keys = np.concatenate([keys_by_hand(model, row, 1) for row in rows])
    expected = sum(np.outer(key, key) for key in keys) / len(keys)
    np.testing.assert_allclose(moments.of(model, [path])[path].numpy(), expected, atol=1e-9)


def test_moments_on_disk_are_the_same_and_damage_is_told(model, tmp_path):
    (path,) = editable(model, [0])
    first = KeyMoments(TEXTS[:4], folder=tmp_path).of(model, [path])[path]
    (file,) = tmp_path.iterdir()
    written = file.read_bytes()
    assert torch.equal(KeyMoments(TEXTS[:4], folder=tmp_path).of(model, [path])[path], first)
    KeyMoments(TEXTS[:5], folder=tmp_path).of(model, [path])
    assert len(list(tmp_path.iterdir())) == 2 and file.read_bytes() == written
    file.write_bytes(written[:50])
    with pytest.raises(ValueError, match="is damaged .*Delete it; it is computed anew"):
        KeyMoments(TEXTS[:4], folder=tmp_path).of(model, [path])
    file.unlink()
    assert torch.equal(KeyMoments(TEXTS[:4], folder=tmp_path).of(model, [path])[path], first)
    assert file.read_bytes() == written  # deterministic


def test_moments_without_texts_are_refused():
    with pytest.raises(ValueError, match="Give texts or questions"):
        KeyMoments()


def test_subjects_are_found_in_prompts_with_and_without_prefix(model):
    rows = edit_rows(model, EDITS, ["A text before it. Norbach is old."])
    tokens = [model.tokenizer.convert_ids_to_tokens(row) for row in rows.rows.ids.tolist()]
    for row, start, place, owner in zip(tokens, rows.starts, rows.places, rows.owners, strict=True):
        text = model.tokenizer.convert_tokens_to_string(row[start : place + 1]).strip()
        assert text.startswith(EDITS[owner].subject) and len(text) <= len(EDITS[owner].subject) + 1
    assert rows.owners.tolist() == [0, 0, 1, 1, 2, 2] and (rows.places[1::2] > rows.places[::2]).all()
    means = mean_by_owner(torch.arange(6.0)[:, None], rows.owners)
    assert means[:, 0].tolist() == [0.5, 2.5, 4.5]


def test_subject_outside_its_question_is_refused(model):
    with pytest.raises(ValueError, match="'Fenda' does not stand in the question 'Who\\?'. Write it as there"):
        edit_rows(model, [Edit("Fenda", "Who?", "Orla")])
    with pytest.raises(ValueError, match="nothing to edit"):
        edit_rows(model, [])


# --- Values ---


def test_search_lowers_the_answers_nll_within_its_norm(model):
    (path,) = editable(model, [0])
    rows = edit_rows(model, EDITS)
    own = at_subjects(model, rows, [path])[path][1]
    delta = ValueSearch(**{**SEARCH, "max_norm": 2.0})(model, EDITS, path, replaces=True)
    assert (delta.norm(dim=1) <= 2.0 * own.norm(dim=1) * (1 + 1e-9)).all()
    with torch.no_grad():
        before, after = answer_nll(model, rows, {}), answer_nll(model, rows, {path: at_places(rows, own + delta)})
    assert (after < before).all()
    expected = [-value for value in model.log_likelihoods([e.question for e in EDITS], [e.answer for e in EDITS])]
    np.testing.assert_allclose(before.numpy(), expected, rtol=1e-5)  # which are rounded to float32


def test_searches_of_several_edits_do_not_meet(model):
    (path,) = editable(model, [1])
    search = ValueSearch(**SEARCH)
    alone = [search(model, [edit], path, replaces=False)[0] for edit in EDITS]
    torch.testing.assert_close(search(model, EDITS, path, replaces=False), torch.stack(alone), atol=1e-8, rtol=0)


def test_essence_keeps_what_the_subject_is(model):
    (path,) = editable(model, [0])
    essence = edit_rows(model, [Edit("Norbach", "What is Norbach?", "")])
    own = at_subjects(model, essence, [path])[path][1]

    def moved(weight):
        delta = ValueSearch(**SEARCH, kl_weight=weight)(model, EDITS[1:2], path, replaces=False)
        first = essence.rows.target_kind[0].ge(0).nonzero()[0, 0]
        changed = {}
        for name, value in (("before", own), ("after", own + delta)):
            place = (torch.arange(1), essence.places)
            hook = model.base_model.get_submodule(path).register_forward_hook(
                lambda _, args, output, place=place, value=value: output.index_put(place, value)
            )
            with torch.no_grad():
                changed[name] = model.base_model(essence.rows.ids).logits[0, first].log_softmax(-1)
            hook.remove()
        return float((changed["after"].exp() * (changed["after"] - changed["before"])).sum())

    assert 0 <= moved(100.0) < 0.5 * moved(0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "Give at least one step"),
        ({"lr": float("inf")}, "a finite lr above 0"),
        ({"kl_weight": -1.0}, "Give none below 0"),
        ({"max_norm": 0.0}, "max_norm above it or null"),
        ({"essence": "What?"}, "Write {subject} where the subject stands"),
    ],
)
def test_search_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ValueSearch(**settings)


# --- Editors ---


def test_rome_is_its_formula_with_keys_by_hand(model, moments):
    search = ValueSearch(**SEARCH)
    (path,) = editable(model, [1])
    edited = Rome(layer=1, moments=moments, search=search, damping=0.2).edit(model, EDITS[:1])
    W = model.base_model.get_parameter(f"{path}.weight").numpy()
    rows = edit_rows(model, EDITS[:1])
    k = keys_by_hand(model, prompt_of(model, EDITS[0]), 1)[int(rows.places[0])]
    v = W @ k + search(model, EDITS[:1], path, replaces=True)[0].numpy()
    C = moments.of(model, [path])[path].numpy()
    C = C + 0.2 * np.trace(C) / len(C) * np.eye(len(C))
    u = np.linalg.inv(C) @ k
    np.testing.assert_allclose(
        edited.weights.tensors[f"{path}.weight"].numpy(), W + np.outer(v - W @ k, u) / (u @ k), atol=1e-8
    )


def test_rome_changes_one_weight_by_rank_one(model, moments):
    edited = Rome(layer=0, moments=moments, search=ValueSearch(**SEARCH)).edit(model, EDITS[:1])
    ((name, tensor),) = edited.weights.tensors.items()
    sizes = torch.linalg.svdvals(tensor - model.base_model.get_parameter(name))
    assert sizes[0] > 1e-3 and sizes[1] < 1e-12 * sizes[0]
    assert torch.linalg.matrix_rank(tensor - model.base_model.get_parameter(name)) == 1


def test_rome_makes_edits_one_after_the_other(model, moments):
    editor = Rome(layer=0, moments=moments, search=ValueSearch(**SEARCH))
    together, one_by_one = editor.edit(model, EDITS), None
    for edit in EDITS:
        one_by_one = editor.edit(model, [edit], start=one_by_one)
    ((name, tensor),) = together.weights.tensors.items()
    assert torch.equal(tensor, one_by_one.weights.tensors[name])
    assert torch.linalg.matrix_rank(tensor - model.base_model.get_parameter(name)) == len(EDITS)


def test_random_changes_have_equal_norm_and_rank_one(model, moments):
    editor = Rome(layer=0, moments=moments, search=ValueSearch(**SEARCH))
    ((name, tensor),) = editor.edit(model, EDITS[:1]).weights.tensors.items()
    own = model.base_model.get_parameter(name)
    norm = float((tensor - own).norm())
    start = type(editor.edit(model, EDITS[:1]))(MovedWeights({name: own}))
    drawn = [random_like(start, {name: norm}, seed=seed).weights.tensors[name] - own for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    for change in drawn:
        assert float(change.norm()) == pytest.approx(norm, rel=1e-9) and torch.linalg.matrix_rank(change) == 1


def test_memit_is_its_algorithm_with_keys_by_hand(model, moments):
    search, layers = ValueSearch(**SEARCH), [0, 1]
    edited = Memit(layers=layers, moments=moments, search=search, weight=3.0, damping=0.1).edit(model, EDITS)
    assert all(
        (tensor - model.base_model.get_parameter(n)).norm() > 1e-3 for n, tensor in edited.weights.tensors.items()
    )
    top = "model.layers.1"
    rows = edit_rows(model, EDITS)
    target = at_subjects(model, rows, [top])[top][1] + search(model, EDITS, top, replaces=False)
    tensors = {}
    for place, path in enumerate(editable(model, layers)):
        with installed(model.base_model, tensors):
            K = np.stack(
                [keys_by_hand(model, prompt_of(model, e), place)[p] for e, p in zip(EDITS, rows.places, strict=True)]
            )
            R = (target - at_subjects(model, rows, [top])[top][1]).numpy() / (2 - place)
        C = moments.of(model, [path])[path].numpy()
        C = 3.0 * (C + 0.1 * np.trace(C) / len(C) * np.eye(len(C)))
        change = R.T @ K @ np.linalg.inv(C + K.T @ K)
        weight = model.base_model.get_parameter(f"{path}.weight")
        tensors[f"{path}.weight"] = weight + torch.from_numpy(change)
    assert edited.weights.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(edited.weights.tensors[name], tensor, atol=1e-8, rtol=0)


def test_rome_through_its_weight_is_delta_times_direction(model, moments):
    search = ValueSearch(**SEARCH)
    edited = Rome(layer=1, moments=moments, search=search, damping=0.2, through_weight=True).edit(model, EDITS[:1])
    ((name, tensor),) = edited.weights.tensors.items()
    path = name.removesuffix(".weight")
    k = keys_by_hand(model, prompt_of(model, EDITS[0]), 1)[int(edit_rows(model, EDITS[:1]).places[0])]
    C = moments.of(model, [path])[path].numpy()
    u = np.linalg.inv(C + 0.2 * np.trace(C) / len(C) * np.eye(len(C))) @ k
    direction = torch.from_numpy(u / (u @ k))
    delta = search(model, EDITS[:1], path, directions={path: direction[None]})[0]
    torch.testing.assert_close(
        tensor, model.base_model.get_parameter(name) + torch.outer(delta, direction), atol=1e-8, rtol=0
    )


@pytest.mark.parametrize("kind", ["rome", "memit", "alphaedit"])
def test_weights_answer_as_the_search_through_them_did(model, moments, kind):
    settings = {"moments": moments, "search": ValueSearch(**SEARCH), "through_weight": True}
    editor = {
        "rome": lambda: Rome(layer=1, **settings),
        "memit": lambda: Memit(layers=[0, 1, 2], weight=1.0, **settings),
        "alphaedit": lambda: AlphaEdit(layers=[0, 1, 2], threshold=0.5, **settings),
    }[kind]()
    told = []
    search = editor.search

    def kept(*args, directions, **more):
        told.append((directions, search(*args, directions=directions, **more)))
        return told[-1][1]

    editor.search = kept
    kept.prefixes = ()
    edited = editor.edit(model, EDITS[:1])
    ((directions, delta),) = told
    shares = {
        path: lambda keys, output, d=d[0]: output + (keys @ d)[..., None] * delta[0] / len(directions)
        for path, d in directions.items()
    }
    with torch.no_grad():
        rows = edit_rows(model, EDITS[:1])
        before, simulated = answer_nll(model, rows, {}), answer_nll(model, rows, shares)
        with installed(model.base_model, edited.weights.tensors):
            after = answer_nll(model, rows, {})
    torch.testing.assert_close(after, simulated, atol=1e-8, rtol=0)
    assert after < before - 0.1


def test_alphaedit_keeps_the_keys_of_edits_before(model, moments):
    editor = AlphaEdit(layers=[0], moments=moments, search=ValueSearch(**SEARCH), threshold=0.5)
    first = editor.edit(model, EDITS[:1])
    second = editor.edit(model, EDITS[1:], start=first)
    ((path, past),) = second.past.items()
    rows = edit_rows(model, EDITS)
    keys = at_subjects(model, rows, [path])[path][0]  # of the first block's layer, which no edit changes
    torch.testing.assert_close(past, keys.T @ keys, atol=1e-8, rtol=0)
    torch.testing.assert_close(first.past[path], keys[:1].T @ keys[:1], atol=1e-8, rtol=0)
    change = second.weights.tensors[f"{path}.weight"] - first.weights.tensors[f"{path}.weight"]
    moment = moments.of(model, [path])[path]
    outside = torch.eye(D_FF, dtype=torch.float64) - null_space(moment, 0.5)
    assert (change @ outside).abs().max() < 1e-9 * change.abs().max()


@pytest.mark.parametrize("kind", ["rome", "memit", "alphaedit"])
def test_edits_are_undone_to_the_bit(served, moments, kind):
    model = served
    search = ValueSearch(**SEARCH)
    editor = {
        "rome": Rome(layer=0, moments=moments, search=search),
        "memit": Memit(layers=[0, 1], moments=moments, search=search),
        "alphaedit": AlphaEdit(layers=[0, 1], moments=moments, search=search, threshold=0.5),
    }[kind]
    own = {name: parameter.clone() for name, parameter in model.base_model.named_parameters()}
    before = fingerprint(model.base_model, exact=True)
    first = editor.edit(model, EDITS[:1])
    kept = {name: tensor.clone() for name, tensor in first.weights.tensors.items()}
    second = editor.edit(model, EDITS[1:], start=first)
    with installed(model.base_model, second.weights.tensors):
        assert fingerprint(model.base_model, exact=True) != before
    assert fingerprint(model.base_model, exact=True) == before
    assert all(torch.equal(parameter, own[name]) for name, parameter in model.base_model.named_parameters())
    # The edits before the last are whole too.
    assert all(torch.equal(first.weights.tensors[name], tensor) for name, tensor in kept.items())


def test_edited_weights_are_saved_like_any_version(served, moments, tmp_path):
    model = served
    edited = Rome(layer=0, moments=moments, search=ValueSearch(**SEARCH)).edit(model, EDITS[:1])
    edited.weights.save(tmp_path, model)
    loaded = MovedWeights.load(tmp_path, model)
    assert loaded.tensors.keys() == edited.weights.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in edited.weights.tensors.items())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([9], "Block 9 cannot be edited: the base model has 4, from 0"),
        ([-1], "Block -1 cannot be edited"),
        ([1, 3], "Block 3 cannot be edited: .* the last one gives at a subject reaches no answer"),
        ([], "Give different ones, at least one"),
        ([0, 0], "Give different ones"),
    ],
)
def test_layers_that_are_not_there_are_refused(model, moments, layers, message):
    with pytest.raises(ValueError, match=message):
        Memit(layers=layers, moments=moments).edit(model, EDITS)


def test_norm_behind_the_layer_is_refused(model, moments):
    model.base_model.get_decoder().layers[0].post_feedforward_layernorm = torch.nn.Identity()
    with pytest.raises(ValueError, match="post_feedforward_layernorm behind down_proj.* Take a Llama-like base model"):
        Rome(layer=0, moments=moments).edit(model, EDITS)


def test_editor_settings_out_of_range_are_refused(moments):
    with pytest.raises(ValueError, match="damping is -1.0. Give 0 or more"):
        Rome(layer=0, moments=moments, damping=-1.0)
    with pytest.raises(ValueError, match="weight is 0.0. Give more than 0"):
        Memit(layers=[0], moments=moments, weight=0.0)
    with pytest.raises(ValueError, match="threshold is 1.0. Give a number between 0 and 1"):
        AlphaEdit(layers=[0], moments=moments, threshold=1.0)


def test_trace_restores_nothing_at_noise_zero_and_all_above(model):
    known = EDITS
    assert causal_trace(model, known, noise=0.0).abs().max() < 1e-12
    effects = causal_trace(model, known, noise=1.0, num_samples=2)
    assert effects.shape == (4,) and torch.equal(effects, causal_trace(model, known, noise=1.0, num_samples=2))
    assert effects.abs().max() > 0
