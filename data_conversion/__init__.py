"""Converters of public datasets to nnU-Net's raw format, one file per dataset."""
