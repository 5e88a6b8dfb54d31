//! Errors and texts, and what all functions do with pointers.

use std::ffi::{CStr, CString, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{FfiError, Status, guard};

/// `bridge_error`.
#[derive(Debug)]
pub struct CError {
    status: Status,
    text: CString,
}

/// Does the work of a function and tells its caller how it went.
///
/// # Safety
/// `error` is null or may be written.
pub(super) unsafe fn call(
    error: *mut *mut CError,
    work: impl FnOnce() -> Result<(), FfiError>,
) -> i32 {
    let Err(failure) = guard(work) else {
        return Status::Ok as i32;
    };
    let status = failure.status();
    // There is no way to tell of an error pointer that cannot be written.
    if !error.is_null() && error.is_aligned() {
        let text = c_string(&failure.text());
        let boxed = Box::into_raw(Box::new(CError { status, text }));
        // SAFETY: not null, aligned, and the caller's to be written.
        unsafe { error.write(boxed) };
    }
    status as i32
}

/// A text with an end; a NUL inside is shown as such.
pub(super) fn c_string(text: &str) -> CString {
    CString::new(text).unwrap_or_else(|_| {
        CString::new(text.replace('\0', "\\0")).expect("every NUL was replaced")
    })
}

/// What a pointer points to.
///
/// # Safety
/// It is null or points to a `T` that lives for `'a` and is not written meanwhile.
pub(super) unsafe fn given<'a, T>(
    pointer: *const T,
    what: &'static str,
) -> Result<&'a T, FfiError> {
    if pointer.is_null() {
        return Err(FfiError::Null { what });
    }
    if !pointer.is_aligned() {
        return Err(FfiError::Misaligned { what });
    }
    // SAFETY: not null, aligned, and alive by the rules of the header.
    Ok(unsafe { &*pointer })
}

/// A pointer that a result can be written to.
pub(super) fn output<T>(pointer: *mut T, what: &'static str) -> Result<*mut T, FfiError> {
    if pointer.is_null() {
        return Err(FfiError::Null { what });
    }
    if !pointer.is_aligned() {
        return Err(FfiError::Misaligned { what });
    }
    Ok(pointer)
}

/// Where a result goes that the caller may not want; checked before the work, so that what is done is also told.
pub(super) fn wanted_output<T>(
    pointer: *mut T,
    what: &'static str,
) -> Result<Option<*mut T>, FfiError> {
    (!pointer.is_null())
        .then(|| output(pointer, what))
        .transpose()
}

/// Hands a new object to the caller.
///
/// # Safety
/// `pointer` came from [`output`] and may be written.
pub(super) unsafe fn hand_out<T>(pointer: *mut *mut T, object: T) {
    // SAFETY: checked by `output`.
    unsafe { pointer.write(Box::into_raw(Box::new(object))) };
}

/// Takes an object back from the caller and frees it.
///
/// # Safety
/// `pointer` is null or came from [`hand_out`], and is not used again.
pub(super) unsafe fn take_back<T>(pointer: *mut T) {
    if pointer.is_null() {
        return;
    }
    // There is nobody to tell of a panic; it must not cross.
    let _ = guard(|| {
        // SAFETY: it came from `Box::into_raw`, and is ours again.
        drop(unsafe { Box::from_raw(pointer) });
        Ok(())
    });
}

/// A text.
///
/// # Safety
/// `text` is null or ends with a NUL, and lives for `'a`.
pub(super) unsafe fn text<'a>(
    text: *const c_char,
    what: &'static str,
) -> Result<&'a str, FfiError> {
    // SAFETY: passed on.
    let bytes = unsafe { bytes(text, what) }?;
    std::str::from_utf8(bytes).map_err(|_| FfiError::Utf8 {
        what,
        text: String::from_utf8_lossy(bytes).into_owned(),
    })
}

/// A path, as the system's bytes.
///
/// # Safety
/// As [`text`].
pub(super) unsafe fn path<'a>(
    text: *const c_char,
    what: &'static str,
) -> Result<&'a Path, FfiError> {
    // SAFETY: passed on.
    let bytes = unsafe { bytes(text, what) }?;
    Ok(Path::new(OsStr::from_bytes(bytes)))
}

/// # Safety
/// As [`text`].
unsafe fn bytes<'a>(text: *const c_char, what: &'static str) -> Result<&'a [u8], FfiError> {
    if text.is_null() {
        return Err(FfiError::Null { what });
    }
    // SAFETY: not null; the caller's text ends with a NUL.
    Ok(unsafe { CStr::from_ptr(text) }.to_bytes())
}

/// Hands out a text, which [`bridge_string_free`] takes back.
///
/// # Safety
/// `pointer` came from [`output`] and may be written.
pub(super) unsafe fn hand_out_text(pointer: *mut *mut c_char, text: &str) {
    // SAFETY: checked by `output`.
    unsafe { pointer.write(c_string(text).into_raw()) };
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn bridge_abi_version() -> u32 {
    1
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn bridge_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_error_message(error: *const CError) -> *const c_char {
    // SAFETY: the header's rules.
    match unsafe { given(error, "error") } {
        Ok(error) => error.text.as_ptr(),
        Err(_) => std::ptr::null(),
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_error_status(error: *const CError) -> i32 {
    // SAFETY: the header's rules.
    match unsafe { given(error, "error") } {
        Ok(error) => error.status as i32,
        Err(_) => Status::Ok as i32,
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_error_free(error: *mut CError) {
    // SAFETY: the header's rules.
    unsafe { take_back(error) };
}

/// See the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_string_free(text: *mut c_char) {
    if !text.is_null() {
        // SAFETY: it came from `CString::into_raw`, and is ours again.
        drop(unsafe { CString::from_raw(text) });
    }
}

/// Panics behind the edge, for tests.
#[cfg(feature = "forced-panic")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_forced_panic(error: *mut *mut CError) -> i32 {
    // SAFETY: the header's rules.
    unsafe { call(error, || panic!("forced panic")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_status_and_a_text() {
        let mut error = std::ptr::null_mut();
        // SAFETY: a pointer of ours.
        let status = unsafe { call(&raw mut error, || panic!("on purpose")) };
        assert_eq!(status, Status::Internal as i32);
        // SAFETY: `call` handed the error out.
        let text = unsafe { CStr::from_ptr(bridge_error_message(error)) };
        assert!(text.to_str().unwrap().contains("on purpose"));
        // SAFETY: as above, once.
        unsafe { bridge_error_free(error) };
        // SAFETY: null is allowed.
        let status = unsafe { call(std::ptr::null_mut(), || panic!("unseen")) };
        assert_eq!(status, Status::Internal as i32);
    }

    #[test]
    fn a_nul_inside_a_text_does_not_end_it() {
        assert_eq!(c_string("a\0b").to_str().unwrap(), "a\\0b");
    }
}
