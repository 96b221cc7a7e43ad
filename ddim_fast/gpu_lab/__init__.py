"""Proof about GPU code without a GPU: PTX executed on the CPU, a fake CUDA device, and a stand-in for CUDA graphs."""
