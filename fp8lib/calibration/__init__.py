"""Activation statistics: what a model feeds its weights.

recording              hooks on the modules of a transformers model
input_statistics       the sums they keep
coverage               from sums to entries of the file; experts that saw too few tokens
statistics_file        the file's format, and reading it
statistics_writer      writing it
json_members           reading large JSON
second_moments         sums of products of channels
second_moments_file    their file's format, and reading it
second_moments_writer  writing it
report                 the closing summary

May import model, streaming, checkpoint and numerics.
"""
