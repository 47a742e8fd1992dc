"""PeftConfig: what every adapter configuration has, and its file, `adapter_config.json`.

The file is data only: reading one calls the registered configuration class with its values and imports or runs nothing
that the file names.
"""

# ruff: noqa: RUF009 (option() makes a dataclasses.field)

from __future__ import annotations

import inspect
import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from pylora.config.enums import PeftType, TaskType
from pylora.config.fields import option, unexpected_keys_message
from pylora.config.files import replacing
from pylora.errors import UnsupportedFeatureError

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "adapter_config.json"

# Written as `peft_version`. Readers take it as the version of the format: the release of PEFT whose fields and meanings
# the file follows. pylora's own version number would make them think of a PEFT of years ago.
PEFT_FORMAT_VERSION = "0.21.2"

# Filled by `register_config`; the name is PEFT's, since code looks configuration classes up here.
PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {}


@dataclass
class PeftConfig:
    """Base of adapter configurations: the fields common to all methods, reading and writing.

    Raises:
        ValueError: `task_type` is not a member of TaskType.
    """

    task_type: str | TaskType | None = option(None, help="The task; chooses the model class and the heads to train.")
    peft_type: str | PeftType | None = option(None, help="The method; a method's own class sets it.")
    auto_mapping: dict | None = option(
        None, help="Class name and library of a base model that no task type describes; stored for AutoPeftModel."
    )
    peft_version: str | None = option(None, help="Version of PEFT whose format this is; filled in when empty.")
    base_model_name_or_path: str | None = option(None, help="Where the base model came from.")
    revision: str | None = option(None, help="Revision of the base model.")
    inference_mode: bool = option(False, help="The adapter is for inference: its weights are loaded frozen.")

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            known = ", ".join(member.value for member in TaskType)
            raise ValueError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: {known}."
            )
        if self.peft_version is None:
            self.peft_version = PEFT_FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, sub-configurations as dicts too. Sets stay sets."""
        return asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` into `save_directory`, which is created when missing.

        The text is made before anything is written, and an old file is replaced in one step.

        Args:
            save_directory: A folder.
            **kwargs: `auto_mapping_dict`, stored as the file's `auto_mapping`. Others are ignored.

        Raises:
            AssertionError: `save_directory` is a file.
            TypeError: a field holds something that JSON cannot express.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        content = self.to_dict()
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if auto_mapping is not None:
            content["auto_mapping"] = auto_mapping
        text = json.dumps(content, indent=2, sort_keys=True, default=_set_as_list)

        os.makedirs(save_directory, exist_ok=True)
        with replacing(os.path.join(save_directory, CONFIG_NAME)) as path, open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the configuration to a Hugging Face repository, creating it when missing; returns the commit's URL.

        Args:
            repo_id: "owner/name".
            **kwargs: `private` and `token` as for `HfApi.create_repo`; `commit_message`, `commit_description`,
                `revision`, `create_pr` and `token` as for `HfApi.upload_folder`.
        """
        from huggingface_hub import HfApi

        token = kwargs.pop("token", None)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True).repo_id
        kwargs.setdefault("commit_message", "Upload config")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Self:
        """Read the configuration from a folder or from a Hugging Face repository.

        The file's `peft_type` chooses the class, so `PeftConfig.from_pretrained` of a LoRA adapter is a LoraConfig.

        Args:
            pretrained_model_name_or_path: A folder with an `adapter_config.json`, or a repository's id.
            subfolder: A folder below that.
            **kwargs: Arguments of `huggingface_hub.hf_hub_download` (`token`, `revision`, `cache_dir`, ...), and values
                for fields that this class declares and the file does not contain. Others are ignored.

        Raises:
            ValueError: there is no such file.
            KeyError: the file's `peft_type` is no method at all.
            UnsupportedFeatureError: it is a method other than LoRA.
            TypeError: the file has neither `peft_type` nor only fields of this class.
        """
        path = _find_config_file(pretrained_model_name_or_path, subfolder, kwargs)
        loaded = cls.from_json_file(path)
        if not isinstance(loaded, dict):
            raise TypeError(f"{path}: expected a JSON object, got {type(loaded).__name__}")
        # `revision` is the download's, not the field: the one in the file is the base model's.
        own = {key: value for key, value in kwargs.items() if key in cls.__annotations__ and key != "revision"}
        return cls.from_peft_type(**cls.check_kwargs(**{**own, **loaded}))

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Self:
        """Build the configuration that `peft_type` names, or this class when there is no `peft_type`.

        Keys that the class does not have are dropped with a warning: newer versions add fields.
        """
        config_cls: type[PeftConfig] = _config_class(kwargs["peft_type"]) if "peft_type" in kwargs else cls
        unknown = set(kwargs) - {field.name for field in fields(config_cls) if field.init}
        if unknown:
            if "peft_type" not in kwargs:
                raise TypeError(
                    f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
                )
            warnings.warn(unexpected_keys_message(unknown, config_cls.__name__), stacklevel=2)
        config = config_cls(**{key: value for key, value in kwargs.items() if key not in unknown})
        return config  # type: ignore[return-value]

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The content of a configuration file as a dict. A `runtime_config` in it is dropped with a warning."""
        with open(path_json_file, encoding="utf-8") as file:
            content = json.load(file)
        if isinstance(content, dict) and "runtime_config" in content:
            del content["runtime_config"]
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored. "
                "Runtime configurations are only valid at runtime.",
                stacklevel=2,
            )
        return content

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """A hook for subclasses: look at the values read from a file, before the instance is built, and return them."""
        return kwargs

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike[str], **hf_hub_download_kwargs: Any) -> str:
        """The `peft_type` that an adapter's file names. The keyword arguments are those of `from_pretrained`."""
        subfolder = hf_hub_download_kwargs.pop("subfolder", None)
        return cls.from_json_file(_find_config_file(model_id, subfolder, hf_hub_download_kwargs))["peft_type"]

    @property
    def is_prompt_learning(self) -> bool:
        """False: pylora has no prompt methods. Code written for PEFT asks."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False: pylora has no prompt methods. Code written for PEFT asks."""
        return False


def register_config(peft_type: PeftType, config_cls: type[PeftConfig]) -> None:
    """Make `from_pretrained` and `from_peft_type` build `config_cls` for `peft_type`."""
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls


def _config_class(peft_type: Any) -> type[PeftConfig]:
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    if peft_type in list(PeftType):
        raise UnsupportedFeatureError(
            f"peft_type: expected LORA, got {PeftType(peft_type).value}: pylora has no mechanism for other methods"
        )
    raise KeyError(peft_type)


def _find_config_file(source: str | os.PathLike[str], subfolder: str | None, kwargs: dict[str, Any]) -> str:
    """The local path of the configuration file, downloaded when `source` is not a folder that has it."""
    path = os.path.join(source, subfolder or "", CONFIG_NAME)
    if os.path.isfile(path):
        return path
    missing = f"Can't find '{CONFIG_NAME}' at '{source}'"
    if os.path.isdir(source):
        # A folder is never taken for a repository: whoever owns a repository of that name would choose the adapter.
        raise ValueError(missing)
    try:
        from huggingface_hub import hf_hub_download

        accepted = inspect.signature(hf_hub_download).parameters
        hub_kwargs = {key: value for key, value in kwargs.items() if key in accepted}
        return hf_hub_download(source, CONFIG_NAME, subfolder=subfolder, **hub_kwargs)  # type: ignore[arg-type]
    except Exception as error:
        # No network, no such repository, a malformed id: whatever keeps the file away, it is not where the caller said.
        raise ValueError(missing) from error


def _set_as_list(value: Any) -> list[Any]:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    raise TypeError(f"adapter_config.json: cannot store a value of type {type(value).__name__}: {value!r}")
