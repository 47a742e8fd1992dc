"""Small tensor functions that PEFT exports and code written for it uses."""

from __future__ import annotations

import torch


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """Decoder inputs from labels: one place to the right behind the start token, -100 replaced by padding.

    Args:
        input_ids: integers, [batch, sequence].
        pad_token_id: takes the place of -100.
        decoder_start_token_id: the first token of each row.

    Raises:
        ValueError: `pad_token_id` is None.
    """
    if pad_token_id is None:
        raise ValueError("shift_tokens_right: pad_token_id: expected a token id, got None (has to be defined)")
    start = input_ids.new_full((input_ids.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def bloom_model_postprocess_past_key_value(
    past_key_values: tuple[torch.Tensor, ...],
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Past keys and values in the layout of BLOOM's attention.

    Args:
        past_key_values: tensors that concatenate to [2 * layers, batch, heads, tokens, head_dim], keys first.

    Returns:
        for each layer a pair of keys [batch * heads, head_dim, tokens] and values [batch * heads, tokens, head_dim].
    """
    keys, values = torch.cat(past_key_values).chunk(2)
    layers, batch, heads, tokens, head_dim = keys.shape
    # The keys are read in the order of their memory after the transpose, as PEFT does: prefixes are trained for that.
    keys = keys.transpose(2, 3).reshape(layers, batch * heads, head_dim, tokens)
    return tuple(zip(keys, values.flatten(1, 2), strict=True))


def starcoder_model_postprocess_past_key_value(past_key_values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Past keys and values in the layout of GPT-BigCode's multi-query attention, whose heads share one of each.

    Args:
        past_key_values: for each layer [2, batch, heads, tokens, head_dim].

    Returns:
        for each layer [batch, tokens, 2 * head_dim].
    """
    return tuple(torch.cat((layer[0, :, 0], layer[1, :, 0]), dim=-1) for layer in past_key_values)


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """The transpose of `weight` if `fan_in_fan_out`, else `weight`; a parameter stays a parameter."""
    if not fan_in_fan_out:
        return weight
    return torch.nn.Parameter(weight.T) if isinstance(weight, torch.nn.Parameter) else weight.T


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """(device, address, size in bytes) of a tensor's storage: equal for tensors that share one."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()
