"""Text into Megatron's indexed data sets, and the checks that training makes on them."""
