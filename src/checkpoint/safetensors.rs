//! Hub folders: `config.json` and safetensors files.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value as Json;

use super::{Description, HubFiles, Mapping, OpenOptions, TensorView, check_disjoint};
use crate::error::{Error, Result, unsupported};
use crate::tensor::DType;

/// No JSON file beside a model is larger; the largest real ones (tokenizer.json) reach some 30 MB.
const MAX_JSON_BYTES: u64 = 256 << 20;

pub(super) fn open(folder: &Path, options: &OpenOptions) -> Result<(Description, BTreeMap<String, TensorView>)> {
    let config = json(&folder.join("config.json"))?.ok_or_else(|| Error::format(folder, "has no config.json"))?;
    let mut tensors = BTreeMap::new();
    let index_path = folder.join("model.safetensors.index.json");
    if let Some(index) = json(&index_path)? {
        let map =
            index["weight_map"].as_object().ok_or_else(|| Error::format(&index_path, "weight_map is no object"))?;
        let mut files = BTreeMap::<&str, Vec<&str>>::new();
        for (tensor, file) in map {
            let file = file
                .as_str()
                .ok_or_else(|| Error::format(&index_path, format!("the file of {tensor} is no string")))?;
            files.entry(file).or_default().push(tensor);
        }
        for (file, names) in files {
            // A file name only: an index must not reach outside its folder.
            let mut components = Path::new(file).components();
            if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
                return Err(Error::format(&index_path, format!("{file:?} is no file name within the folder")));
            }
            let path = folder.join(file);
            let found = read_file(&path, options)?;
            if let Some(missing) = names.iter().find(|n| !found.contains_key(**n)) {
                return Err(Error::format(
                    &path,
                    format!("tensor {missing} is missing, model.safetensors.index.json expects it here"),
                ));
            }
            for (name, tensor) in found {
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(Error::format(&path, format!("tensor {name} is in two files")));
                }
            }
        }
    } else {
        tensors = read_file(&folder.join("model.safetensors"), options)?;
    }
    let tokenizer = Some(folder.join("tokenizer.json")).filter(|p| p.is_file());
    let files = HubFiles {
        config,
        tokenizer_config: json(&folder.join("tokenizer_config.json"))?,
        special_tokens_map: json(&folder.join("special_tokens_map.json"))?,
        generation_config: json(&folder.join("generation_config.json"))?,
        tokenizer,
        chat_templates: chat_templates(folder)?,
    };
    Ok((Description::Hub(Box::new(files)), tensors))
}

fn chat_templates(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut templates = BTreeMap::new();
    if let Some(template) = text(&folder.join("chat_template.jinja"))? {
        templates.insert("default".to_owned(), template);
    }
    let Ok(files) = std::fs::read_dir(folder.join("additional_chat_templates")) else { return Ok(templates) };
    for file in files.flatten() {
        let path = file.path();
        let name = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".jinja"));
        if let (Some(name), Some(template)) = (name, text(&path)?) {
            templates.insert(name.to_owned(), template);
        }
    }
    Ok(templates)
}

/// The text of a file that may be missing.
fn text(path: &Path) -> Result<Option<String>> {
    let metadata = match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| Error::io(path, e))?,
    };
    if !metadata.is_file() || metadata.len() > MAX_JSON_BYTES {
        let what = format!("is no regular file of at most {MAX_JSON_BYTES} bytes");
        return Err(Error::format(path, what));
    }
    std::fs::read_to_string(path).map(Some).map_err(|e| Error::io(path, e))
}

fn json(path: &Path) -> Result<Option<Json>> {
    text(path)?
        .map(|t| serde_json::from_str(&t).map_err(|e| Error::format(path, format!("is not JSON: {e}"))))
        .transpose()
}

fn read_file(path: &Path, options: &OpenOptions) -> Result<BTreeMap<String, TensorView>> {
    let mapping = Mapping::open(path, options)?;
    // The crate checks the header's length, offsets, sizes and gaps against the bytes.
    let (header, metadata) = SafeTensors::read_metadata(&mapping)
        .map_err(|e| Error::format(path, format!("is not a safetensors file: {e}")))?;
    let data_start = 8 + header;
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                return Err(unsupported!(
                    "{}: tensor {name} has type {other:?}, expected F32, F16 or BF16",
                    path.display()
                ));
            }
        };
        let (start, end) = info.data_offsets;
        let range = data_start.saturating_add(start)..data_start.saturating_add(end);
        let view = TensorView::new(&mapping, &name, dtype, info.shape.clone(), range)?;
        tensors.insert(name, view);
    }
    check_disjoint(tensors.values())?;
    Ok(tensors)
}
