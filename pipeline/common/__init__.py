"""What several parts of the pipeline share: devices, random keys, stratified choices, process and buffer pools."""
