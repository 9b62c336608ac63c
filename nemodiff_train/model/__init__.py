"""An AR family's Megatron model, made tri-mode."""
