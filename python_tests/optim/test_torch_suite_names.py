"""Which of torch's own optimizer tests is written anew here, and why the others are not.

torch's wheel has its tables of optimizers, `torch.testing._internal.common_optimizers`, and not the
tests that run over them, TestOptimRenewed in test/test_optim.py.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from optim.torch_suite import INPUTS

# Every test of TestOptimRenewed, about torch 2.13.
NAMES = [
    "test_adamw_serialization",
    "test_can_load_from_to_named_state_dict",
    "test_can_load_older_state_dict",
    "test_complex",
    "test_complex_2d",
    "test_cpu_load_state_dict",
    "test_deepcopy_copies_all_public_attrs",
    "test_defaults_changed_to_foreach",
    "test_errors",
    "test_foreach_large_tensor",
    "test_foreach_matches_forloop",
    "test_forloop_goes_right_direction",
    "test_forloop_goes_right_direction_multigpu",
    "test_fused_cpu_matches_cuda",
    "test_fused_cpu_matches_device",
    "test_fused_does_not_step_if_foundinf",
    "test_fused_error_on_params_on_meta",
    "test_fused_large_tensor",
    "test_fused_matches_forloop",
    "test_fused_mixed_precision_hook_skips_existing_state",
    "test_fused_mixed_precision_numerics",
    "test_fused_mixed_precision_state_init",
    "test_grads_are_never_inplaced_into",
    "test_load_nontensor_step",
    "test_load_state_dict_post_hook",
    "test_load_state_dict_pre_hook_and_prepend",
    "test_load_state_dict_pre_post_hook",
    "test_mixed_device_dtype",
    "test_non_empty_state",
    "test_optim_infos_do_not_specify_global_cliquey_kwargs",
    "test_optimizer_can_be_printed",
    "test_param_group_with_lrscheduler_goes_right_direction",
    "test_param_groups_lr",
    "test_param_groups_weight_decay",
    "test_peak_memory_foreach",
    "test_rosenbrock_sparse",
    "test_save_load_equality_with_weights_only",
    "test_second_order_optims_return_consistent_types",
    "test_set_default_dtype_works_with_foreach",
    "test_state_dict_deterministic",
    "test_state_dict_post_hook",
    "test_state_dict_pre_hook",
    "test_state_dict_pre_post_hook",
    "test_state_dict_with_cuda_params",
    "test_step_all_hooks",
    "test_step_is_noop_for_zero_grads",
    "test_step_is_noop_when_params_have_no_grad",
    "test_step_iteration",
    "test_step_post_hook",
    "test_step_pre_hook",
    "test_tensor_lr",
]

# By which test here.
COVERED = {
    "test_can_load_from_to_named_state_dict": (
        "test_resuming_gives_the_same_bits_with_names_or_without"
    ),
    "test_can_load_older_state_dict": "test_older_state_dicts",
    "test_deepcopy_copies_all_public_attrs": "test_a_copy_has_all_attributes_and_goes_on_by_itself",
    "test_errors": "test_torchs_own_inputs_and_errors",
    "test_foreach_matches_forloop": "test_implementations_agree_whatever_is_frozen_or_missing",
    "test_forloop_goes_right_direction": "test_the_loss_goes_in_the_right_direction",
    "test_fused_matches_forloop": "test_implementations_agree_whatever_is_frozen_or_missing",
    "test_grads_are_never_inplaced_into": "test_gradients_are_never_written",
    "test_load_nontensor_step": "test_older_state_dicts",
    "test_load_state_dict_post_hook": "test_load_post_hooks_run_in_order_and_see_what_was_loaded",
    "test_load_state_dict_pre_hook_and_prepend": (
        "test_load_pre_hooks_run_in_order_and_may_change_what_is_loaded"
    ),
    "test_load_state_dict_pre_post_hook": "test_load_pre_and_post_hooks_together",
    "test_non_empty_state": "test_every_parameter_moves_and_has_a_state",
    "test_optimizer_can_be_printed": "test_an_optimizer_can_be_printed",
    "test_param_group_with_lrscheduler_goes_right_direction": (
        "test_a_scheduler_sets_what_it_sets_for_torch"
    ),
    "test_param_groups_lr": "test_two_groups_are_two_optimizers",
    "test_param_groups_weight_decay": "test_two_groups_are_two_optimizers",
    "test_save_load_equality_with_weights_only": "test_a_file_holds_what_was_saved",
    "test_set_default_dtype_works_with_foreach": "test_the_default_dtype_changes_nothing",
    "test_state_dict_deterministic": "test_resuming_gives_the_same_bits_with_names_or_without",
    "test_state_dict_post_hook": "test_state_dict_hooks_run_in_order_and_may_change_what_is_saved",
    "test_state_dict_pre_hook": "test_state_dict_hooks_run_in_order_and_may_change_what_is_saved",
    "test_state_dict_pre_post_hook": (
        "test_state_dict_hooks_run_in_order_and_may_change_what_is_saved"
    ),
    "test_step_all_hooks": "test_step_hooks_run_in_order_until_they_are_removed",
    "test_step_is_noop_for_zero_grads": "test_zero_gradients_decay_weights_and_move_nothing",
    "test_step_is_noop_when_params_have_no_grad": "test_without_gradients_a_step_does_nothing",
    "test_step_post_hook": "test_step_hooks_run_in_order_until_they_are_removed",
    "test_step_pre_hook": "test_step_hooks_run_in_order_until_they_are_removed",
    "test_tensor_lr": "test_a_tensor_lr_and_tensor_betas_are_their_floats",
}

COMPLEX = "complex weights are refused by the constructor: test_bad_input.py"
NO_FLAG = "a flag of torch's implementations that ours have none of: foreach, fused, differentiable"
NEEDS_GPUS = "needs a GPU or two, or their memory"
CLOSURE = "of optimizers that call their closure several times in a step"
NOT_APPLICABLE = {
    "test_adamw_serialization": "the key that tells Adam from AdamW: there is no Adam here",
    "test_complex": COMPLEX,
    "test_complex_2d": COMPLEX,
    "test_cpu_load_state_dict": NEEDS_GPUS,
    "test_defaults_changed_to_foreach": NO_FLAG,
    "test_foreach_large_tensor": NEEDS_GPUS,
    "test_forloop_goes_right_direction_multigpu": NEEDS_GPUS,
    "test_fused_cpu_matches_cuda": NEEDS_GPUS,
    "test_fused_cpu_matches_device": NEEDS_GPUS,
    "test_fused_does_not_step_if_foundinf": (
        "ours leave it to GradScaler to skip a step: integration/test_torch_tools.py"
    ),
    "test_fused_error_on_params_on_meta": NO_FLAG,
    "test_fused_large_tensor": NO_FLAG,
    "test_fused_mixed_precision_hook_skips_existing_state": NEEDS_GPUS,
    "test_fused_mixed_precision_numerics": NEEDS_GPUS,
    "test_fused_mixed_precision_state_init": NEEDS_GPUS,
    "test_mixed_device_dtype": NEEDS_GPUS + "; mixed dtypes alone are in test_optimizer.py",
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": "of torch's own tables",
    "test_peak_memory_foreach": NEEDS_GPUS,
    "test_rosenbrock_sparse": "sparse gradients are refused, as by torch's AdamW",
    "test_second_order_optims_return_consistent_types": CLOSURE,
    "test_state_dict_with_cuda_params": NEEDS_GPUS,
    "test_step_iteration": CLOSURE,
}

# Of torch's inputs and errors for AdamW, by their descriptions.
MIXED_BETAS = "floats and tensors are both taken, and their mixture is no mistake"
INPUTS_NOT_OURS = {"amsgrad": "no amsgrad: a second moment that only grows has no place in a basis"}
ERRORS_NOT_OURS = {
    "lr as Tensor doesn't work with foreach & not capturable": NO_FLAG,
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": NO_FLAG,
    "betas must be either both floats or both Tensors": MIXED_BETAS,
}


def test_every_test_of_torchs_is_covered_or_has_a_reason():
    assert sorted([*COVERED, *NOT_APPLICABLE]) == NAMES
    files = Path(__file__).parent.glob("test_torch_suite*.py")
    tests = {
        name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert set(COVERED.values()) <= tests


SCRIPT = """
import json, sys, types, unittest, warnings
try:
    import expecttest
except ImportError:  # torch imports it for helpers that are not used here
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
import torch
from torch.testing._internal.common_optimizers import optim_db
from lowrank_kernels import GaLoreAdamW

def outcome(error):
    given = error.optimizer_error_input
    params = given.params if given.params is not None else [torch.nn.Parameter(torch.ones(1, 1))]
    try:
        GaLoreAdamW(params, **given.kwargs)
    except Exception as raised:
        return isinstance(raised, error.error_type)
    return False

warnings.simplefilter("error")
(adamw,) = (info for info in optim_db if info.optim_cls is torch.optim.AdamW)
errors = adamw.optim_error_inputs_func("cpu", torch.float32)
tests = {
    decorator.test_name
    for info in optim_db
    for decorator in info.decorators
    if getattr(decorator, "cls_name", None) == "TestOptimRenewed"
}
print(json.dumps({
    "names": sorted(tests - {None}),
    "inputs": {i.desc: sorted(i.kwargs.items()) for i in adamw.optim_inputs_func("cpu")},
    "errors": [(e.optimizer_error_input.desc, outcome(e)) for e in errors],
}))
"""


def test_torchs_own_inputs_and_errors():
    """In a process of its own: torch's tables set hypothesis to ten examples when imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["names"]) <= set(NAMES)
    for description, options in found["inputs"].items():
        if description not in INPUTS_NOT_OURS:
            assert INPUTS[description] == dict(options)
    for description, refused in found["errors"]:
        assert refused or description in ERRORS_NOT_OURS, description
