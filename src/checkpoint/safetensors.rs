//! Hub folders: `config.json` and safetensors files.
