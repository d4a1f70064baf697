"""What one module takes over from another that it replaces: hooks and foreign attributes."""

from __future__ import annotations

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)
_FOREIGN = "_lora_foreign"  # the names of what an adapted layer was given
_CLASS = "_lora_class"  # and of which class it had been
# What holds the old module's forward: accelerate's hook, and `module.compile()`.
_BOUND = ("_hf_hook", "_old_forward", "forward", "_compiled_call_impl")


def transplant(old: nn.Module, new: nn.Module) -> None:
    """Gives `new` the hooks of `old`, the same dicts, so that handles still remove them, and those
    of its attributes that are not of its class: `_hf_*`, what users have set. accelerate's hook,
    which wraps a module's forward, is put around the new one's.

    Where an adapted layer hands back to a plain one, these are the attributes that it was given,
    and the class, a subclass of `nn.Linear` perhaps.
    """
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    foreign = vars(old).get(_FOREIGN)
    if foreign is None:
        foreign = [n for n in vars(old) if n not in vars(new) and n not in _BOUND]
        object.__setattr__(new, _FOREIGN, foreign)
        object.__setattr__(new, _CLASS, type(old))
    else:
        new.__class__ = vars(old)[_CLASS]
    for name in foreign:
        object.__setattr__(new, name, vars(old)[name])
    if "_hf_hook" in vars(old):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)
