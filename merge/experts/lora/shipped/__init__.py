"""What goes into the folder of a mixture of adapters beside its tensors."""
