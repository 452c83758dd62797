"""Faster forms of the project's operations: speed only, no meaning. Without this folder all runs.

FORMS says for each operation, by the name of its plain form, where its faster forms are and for
which definition they were written (`parts.ops.definition`, a digest of the plain form's code).
Change a plain form and it runs as you wrote it; the forms here then stand aside until they compute
the same and their digest is renewed: `python -m kernels` shows the one it has and the one noted.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    definition: str  # digest of the plain form that the modules below compute the same as
    cuda: str | None = None  # module of this folder that has a function of the same name
    cpu: str | None = None


FORMS = {
    "flow_grpo.sde_draw": Form("c28cd51fc1c6", cuda="triton_steps"),
    "flow_grpo.sde_log_prob": Form("c6897f28f06e", cuda="triton_steps"),
    "grpo.token_log_probs": Form("1a31be1cd05d", cuda="log_probs", cpu="log_probs"),
    "kernels.log_probs.scan_tile": Form("a079858d1977", cuda="triton_steps"),
    "mmdit.gate_residual": Form("c47e4bc0ce16", cuda="triton_norms", cpu="cpu_forms"),
    "mmdit.gelu_linear": Form("da63b01daec0", cpu="cpu_forms"),
    "mmdit.joint_qkv": Form("016619f7aff1", cuda="triton_heads"),
    "mmdit.modulate": Form("b30a27bae71b", cuda="triton_norms", cpu="cpu_forms"),
    "parts.lora.add_change": Form("e83cfc1cd9e8", cuda="lora_forms"),
    "parts.ops.channels_last": Form("daadf2e7d1d9", cpu="cpu_forms"),
    "parts.ops.rms_norm": Form("37b0ac3e8dfb", cuda="triton_norms", cpu="cpu_forms"),
    "parts.ops.split_qkv": Form("0cc9841bd518", cuda="triton_heads"),
    "qwen_vl.attend_shared": Form("a28acf58ae5c", cuda="shared_attention", cpu="shared_attention"),
    "qwen_vl.inverse_cdf": Form("2ce55d185cfb", cuda="inverse_cdf", cpu="inverse_cdf"),
    "qwen_vl.rotate": Form("18b421704553", cpu="cpu_forms"),
    "qwen_vl.split_rotate": Form("6ad22dfb09ab", cuda="triton_heads"),
    "qwen_vl.swiglu": Form("48ded7082d64", cuda="triton_steps"),
}
