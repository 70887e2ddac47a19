"""Common tools of the pipeline: devices, random keys, stratified subsets, process and buffer pools."""
