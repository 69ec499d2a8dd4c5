"""ObjectStoreLibrary on fsspec's file systems of memory and disk: the same entries, whole or missing."""

import uuid

import fsspec
import pytest

from hypernet.adapters.library import AdapterLibrary
from hypernet.adapters.object_store import ObjectStoreLibrary


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"memory://{uuid.uuid4().hex}/library" if request.param == "memory" else f"file://{tmp_path}/library"


@pytest.fixture
def adapters(make_doc_to_lora):
    model = make_doc_to_lora()
    return [model.internalize(text) for text in ("Norbach lies on the Palno.", "Ilda Renwick founded it.")]


def names(url):
    files, root = fsspec.url_to_fs(url)
    return {path.removeprefix(root).lstrip("/") for path in files.find(root)}


def test_what_is_added_is_an_ordinary_library_once_copied(url, adapters, tmp_path):
    library = ObjectStoreLibrary(url + "/")
    assert list(library.provenances()) == []
    ids = [library.add(adapter) for adapter in [*adapters, adapters[0]]]
    files, root = fsspec.url_to_fs(url)
    files.get(root, str(tmp_path / "copy"), recursive=True)
    copied = AdapterLibrary(tmp_path / "copy")
    assert not copied.verify() and {entry.id for entry in copied.list()} == set(ids) and len(set(ids)) == 2
    found = sorted(provenance["documents"][0]["sha256"] for provenance in library.provenances())
    assert found == sorted(document for entry in copied.list() for _, document in entry.documents)
    assert copied.load(ids[0]).content_id() == ids[0] == adapters[0].content_id()


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_upload_that_was_cut_off_is_missing_and_made_again(url, adapters, monkeypatch, left):
    """As a kill would leave it: after so many files, and in the middle of the next."""
    library = ObjectStoreLibrary(url)
    whole = type(library.files).put_file
    done = []

    def put_file(self, local, remote, **settings):
        if len(done) == left:
            with open(local, "rb") as file:
                self.pipe_file(remote, file.read()[:40])
            raise KeyboardInterrupt
        done.append(remote)
        whole(self, local, remote, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(library.files), "put_file", put_file)
        library.add(adapters[0])
    assert len(names(url)) == left + 1 and list(library.provenances()) == []
    library.add(adapters[0])
    assert len(list(library.provenances())) == 1


def test_entry_json_is_the_last_file_to_come(url, adapters, monkeypatch):
    library = ObjectStoreLibrary(url)
    came = []
    whole = type(library.files).put_file
    monkeypatch.setattr(
        type(library.files), "put_file", lambda self, a, b, **kw: (came.append(b), whole(self, a, b, **kw))[1]
    )
    identity = library.add(adapters[0])
    assert came[-1].endswith(f"{identity}/entry.json") and len(came) == 4


@pytest.mark.parametrize(("url", "says"), [("gibberish://x", "Protocol not known"), ("sftp://h/x", "")])
def test_url_that_cannot_be_opened_is_one_line(url, says):
    with pytest.raises(ValueError, match=f"Cannot open {url}.*{says}.*Check the URL") as caught:
        ObjectStoreLibrary(url)
    assert "\n" not in str(caught.value)
