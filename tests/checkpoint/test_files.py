import os
import stat

import pytest

from pylora.checkpoint.files import (
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    adapter_folder,
    find_weights,
    split_hub_arguments,
    staged_files,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_staged_files_appear_together(tmp_path):
    with staged_files() as stage:
        (stage.folder(tmp_path) / "a").write_text("1")
        (stage.folder(tmp_path / "sub" / "deep") / "b").write_text("2")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "1"
    assert (tmp_path / "sub" / "deep" / "b").read_text() == "2"
    assert names(tmp_path) == ["a", "sub"]
    assert names(tmp_path / "sub" / "deep") == ["b"]


def test_a_failure_leaves_old_files_and_no_others(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="disk full"), staged_files() as stage:  # noqa: PT012
        (stage.folder(tmp_path) / "a").write_text("new")
        stage.folder(tmp_path / "new_folder" / "deep")
        raise OSError("disk full")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_in_the_way_is_found_before_the_first_file_is_moved(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError, match="b"), staged_files() as stage:  # noqa: PT012
        (stage.folder(tmp_path) / "a").write_text("new")
        (stage.folder(tmp_path) / "b").write_text("new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a", "b"]


def test_folders_that_someone_else_uses_meanwhile_stay(tmp_path):
    with pytest.raises(OSError), staged_files() as stage:  # noqa: PT012
        stage.folder(tmp_path / "new")
        (tmp_path / "new" / "other").write_text("x")
        raise OSError
    assert names(tmp_path / "new") == ["other"]


def test_the_mode_of_a_replaced_file_is_kept(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o640)
    with staged_files() as stage:
        (stage.folder(tmp_path) / "a").write_text("new")
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o640


def test_adapter_folder(tmp_path):
    assert adapter_folder(tmp_path, "default") == tmp_path
    assert adapter_folder(tmp_path, "other") == tmp_path / "other"
    with pytest.raises(ValueError, match="adapter_name"):
        adapter_folder(tmp_path, "../other")


def test_safetensors_come_before_bin(tmp_path):
    (tmp_path / WEIGHTS_NAME).touch()
    assert find_weights(tmp_path).name == WEIGHTS_NAME
    (tmp_path / SAFETENSORS_WEIGHTS_NAME).touch()
    assert find_weights(str(tmp_path)).name == SAFETENSORS_WEIGHTS_NAME


def test_subfolder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / SAFETENSORS_WEIGHTS_NAME).touch()
    assert find_weights(tmp_path, subfolder="sub").parent == tmp_path / "sub"
    with pytest.raises(ValueError, match="Can't find weights"):
        find_weights(tmp_path)


def test_a_path_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(ValueError, match="Can't find weights"):
        find_weights(tmp_path)
    with pytest.raises(ValueError, match="Can't find weights"):
        find_weights(tmp_path / "missing")


class FakeHub:
    """Stands in for `hf_hub_download`: serves the files it was given, refuses the others as the real one does."""

    def __init__(self, folder, *served):
        self.folder, self.served, self.calls = folder, served, []

    def __call__(self, repo_id, filename, subfolder=None, **kwargs):
        from huggingface_hub.errors import EntryNotFoundError

        self.calls.append((repo_id, filename, subfolder, kwargs))
        if filename not in self.served:
            raise EntryNotFoundError(f"no {filename}")
        (self.folder / filename).touch()
        return str(self.folder / filename)


def test_a_repository_is_asked_for_safetensors_and_then_for_bin(tmp_path, monkeypatch):
    import huggingface_hub

    hub = FakeHub(tmp_path, WEIGHTS_NAME)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    path = find_weights("owner/name", subfolder="sub", revision="r1", use_auth_token="t")
    assert path == tmp_path / WEIGHTS_NAME
    arguments = {"revision": "r1", "token": "t"}
    assert hub.calls == [
        ("owner/name", SAFETENSORS_WEIGHTS_NAME, "sub", arguments),
        ("owner/name", WEIGHTS_NAME, "sub", arguments),
    ]


def test_a_repository_without_weights(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", FakeHub(tmp_path))
    with pytest.raises(ValueError, match="Can't find weights for 'owner/name'"):
        find_weights("owner/name")


def test_hub_arguments_are_told_from_others():
    hub, other = split_hub_arguments({"revision": "r", "subfolder": "s", "ignore_mismatched_sizes": True})
    assert hub == {"revision": "r", "subfolder": "s"}
    assert other == {"ignore_mismatched_sizes": True}
