// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! JSON-RPC 2.0, as far as one object per line needs it: no batches.

use serde_json::{Map, Value, json};

/// The line is not JSON.
pub const PARSE_ERROR: i32 = -32700;
/// The JSON is not a request.
pub const INVALID_REQUEST: i32 = -32600;
/// There is no such method.
pub const METHOD_NOT_FOUND: i32 = -32601;
/// The parameters do not fit the method.
pub const INVALID_PARAMS: i32 = -32602;
/// The daemon failed by itself.
pub const INTERNAL_ERROR: i32 = -32603;
/// There are too many connections (one of the codes that JSON-RPC leaves to servers).
pub const BUSY: i32 = -32000;
/// There is no client, or pool, of that name.
pub const NOT_FOUND: i32 = -32001;
/// Who asks may look and change nothing.
pub const FORBIDDEN: i32 = -32002;

/// An error as the caller sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// One of the codes above.
    pub code: i32,
    /// One line for people.
    pub message: String,
}

impl Error {
    /// An error.
    pub fn new(code: i32, message: impl Into<String>) -> Self {
        Error {
            code,
            message: message.into(),
        }
    }
}

/// The line that answers with an error.
pub fn failure(id: &Value, error: &Error) -> Vec<u8> {
    let error = json!({ "code": error.code, "message": error.message });
    line(&json!({ "jsonrpc": "2.0", "id": id, "error": error }))
}

fn success(id: &Value, result: &Value) -> Vec<u8> {
    line(&json!({ "jsonrpc": "2.0", "id": id, "result": result }))
}

fn line(value: &Value) -> Vec<u8> {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Answers one line. A notification (a request without id) is executed and gets no answer, and
/// so does an empty line.
pub fn answer(
    bytes: &[u8],
    call: impl FnOnce(&str, &Map<String, Value>) -> Result<Value, Error>,
) -> Option<Vec<u8>> {
    if bytes.trim_ascii().is_empty() {
        return None;
    }
    let request = match serde_json::from_slice::<Value>(bytes) {
        Ok(Value::Object(request)) => request,
        Ok(Value::Array(_)) => {
            let error = Error::new(
                INVALID_REQUEST,
                "batches are not taken; send one object per line",
            );
            return Some(failure(&Value::Null, &error));
        }
        Ok(_) => {
            let error = Error::new(INVALID_REQUEST, "a request is an object");
            return Some(failure(&Value::Null, &error));
        }
        Err(error) => {
            let error = Error::new(PARSE_ERROR, format!("not JSON: {error}"));
            return Some(failure(&Value::Null, &error));
        }
    };
    let id = request.get("id").cloned();
    let outcome = execute(&request, call);
    match (id, outcome) {
        (Some(id @ (Value::Null | Value::String(_) | Value::Number(_))), Ok(result)) => {
            Some(success(&id, &result))
        }
        (Some(id @ (Value::Null | Value::String(_) | Value::Number(_))), Err(error)) => {
            Some(failure(&id, &error))
        }
        // Without an id there is nobody to tell, unless it was no request at all.
        (None, Err(error)) if error.code == INVALID_REQUEST => Some(failure(&Value::Null, &error)),
        (None, _) => None,
        (Some(_), _) => Some(failure(&Value::Null, &bad_id())),
    }
}

fn bad_id() -> Error {
    Error::new(INVALID_REQUEST, "id must be a string, a number or null")
}

fn execute(
    request: &Map<String, Value>,
    call: impl FnOnce(&str, &Map<String, Value>) -> Result<Value, Error>,
) -> Result<Value, Error> {
    if request.get("jsonrpc").and_then(Value::as_str) != Some("2.0") {
        return Err(Error::new(INVALID_REQUEST, "jsonrpc must be \"2.0\""));
    }
    if request
        .get("id")
        .is_some_and(|id| id.is_object() || id.is_array() || id.is_boolean())
    {
        return Err(bad_id());
    }
    let Some(method) = request.get("method").and_then(Value::as_str) else {
        return Err(Error::new(INVALID_REQUEST, "method must be a string"));
    };
    match request.get("params") {
        None => call(method, &Map::new()),
        Some(Value::Object(params)) => call(method, params),
        Some(Value::Array(list)) if list.is_empty() => call(method, &Map::new()),
        Some(Value::Array(_)) => Err(Error::new(
            INVALID_PARAMS,
            "params are taken by name; send an object",
        )),
        Some(_) => Err(Error::new(INVALID_REQUEST, "params must be an object")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(text: &str) -> Option<Value> {
        let answer = answer(text.as_bytes(), |method, params| match method {
            "echo" => Ok(Value::Object(params.clone())),
            _ => Err(Error::new(METHOD_NOT_FOUND, "no")),
        })?;
        assert_eq!(answer.last(), Some(&b'\n'));
        Some(serde_json::from_slice(&answer).unwrap())
    }

    fn code(text: &str) -> i64 {
        ask(text).unwrap()["error"]["code"].as_i64().unwrap()
    }

    #[test]
    fn requests_are_answered() {
        let answer = ask(r#"{"jsonrpc":"2.0","id":7,"method":"echo","params":{"a":1}}"#).unwrap();
        assert_eq!(answer, json!({"jsonrpc":"2.0","id":7,"result":{"a":1}}));
        assert_eq!(ask(r#"{"jsonrpc":"2.0","method":"echo"}"#), None);
        assert_eq!(ask("  \r"), None);
        assert_eq!(
            code(r#"{"jsonrpc":"2.0","id":"x","method":"other"}"#),
            -32601
        );
    }

    #[test]
    fn what_is_no_request_is_said_to_be_none() {
        for text in ["{", "\u{1}", "nonsense", "{\"jsonrpc\":\"2.0\""] {
            assert_eq!(code(text), -32700, "{text}");
        }
        assert_eq!(
            answer(b"\xff\xfe", |_, _| Ok(Value::Null)).map(|a| a.is_empty()),
            Some(false)
        );
        for text in [
            "[]",
            "1",
            "null",
            "{}",
            r#"{"jsonrpc":"1.0","id":1,"method":"echo"}"#,
            r#"{"jsonrpc":"2.0","id":1}"#,
            r#"{"jsonrpc":"2.0","id":1,"method":2}"#,
            r#"{"jsonrpc":"2.0","id":{},"method":"echo"}"#,
            r#"{"jsonrpc":"2.0","id":true,"method":"echo"}"#,
            r#"{"jsonrpc":"2.0","id":1,"method":"echo","params":3}"#,
        ] {
            assert_eq!(code(text), -32600, "{text}");
        }
        assert_eq!(
            code(r#"{"jsonrpc":"2.0","id":1,"method":"echo","params":[1]}"#),
            -32602
        );
    }
}
